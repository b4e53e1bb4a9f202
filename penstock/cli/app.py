"""The verbs under one roof: both spellings of every flag, and errors as one line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer
from typer.main import get_command

import penstock
from penstock.cli import (
    bench,
    bench_serve,
    build,
    chat,
    check,
    convert,
    demo,
    generate,
    inspect,
    profile,
    refit,
    run_engine,
    serve,
    unbuilt,
)
from penstock.cli.console import say
from penstock.errors import InputError, PenstockError, UnsupportedError

INTERRUPTED = 130

# The ancestor of every complaint about flags, wherever the installed typer keeps it.
_UsageError = cast(type[Exception], typer.BadParameter.__bases__[0])

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    # One spelling inside the parser: --max_batch_size and --max-batch-size are the same flag.
    context_settings={
        "token_normalize_func": lambda name: _dashed(name),
        "help_option_names": ["-h", "--help"],
    },
)
app.command("demo")(demo.demo)
app.command("convert")(convert.convert)
app.command("build")(build.build)
app.command("check")(check.check)
app.command("inspect")(inspect.inspect)
app.command("run")(run_engine.run)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("profile")(profile.profile)
app.command("refit")(refit.refit)
bench.app.command("serve")(bench_serve.serve)
app.add_typer(bench.app, name="bench")
for verb, about in unbuilt.VERBS.items():
    app.command(verb, help=about, context_settings=unbuilt.ANYTHING)(unbuilt.verb(verb))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"penstock {penstock.__version__}")
        raise typer.Exit


@app.callback()
def penstock_(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Compile a language model's checkpoint into an engine, and run it. Flags take `_` or `-` alike."""


def run(args: Sequence[str] | None = None) -> int:
    """Run one command; `args` None: those of the process. Returns its exit code."""
    command = get_command(app)
    words, debug = split_debug(command, list(sys.argv[1:] if args is None else args))
    if words in ([], ["bench"]):  # no verb: what there are
        words.append("--help")
    try:
        result = command.main(words, prog_name="penstock", standalone_mode=False)
    except _UsageError as error:
        say(f"error: {_message(error)}; see `penstock --help` or `penstock VERB --help`")
        return 2
    except PenstockError as error:
        if debug:
            raise
        say(f"error: {' '.join(str(error).split())}")
        return 2 if isinstance(error, InputError | UnsupportedError) else 1
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stderr.close()
        return 1
    except OSError as error:  # a directory that cannot be written, a full disk
        if debug:
            raise
        say(f"error: {' '.join(str(error).split())}; check the path, its permissions and the room left")
        return 1
    except RuntimeError as error:
        if debug or "home directory" not in str(error):  # what pathlib says where there is none
            raise
        say(f"error: {error} Set HOME, or give --cache_dir")
        return 1
    if result == INTERRUPTED:  # the parser may have made an exit code of the interrupt itself
        say("interrupted")
    return result if isinstance(result, int) else 0


def split_debug(command: Any, words: Sequence[str]) -> tuple[list[str], bool]:
    """The words without `--debug`, and whether it was there: as a word of its own, not as the value of an option."""
    verb = next((word for word in words if not word.startswith("-")), "")
    options = command.commands[verb].params if verb in command.commands else []
    valued = {_dashed(name) for each in options if not getattr(each, "is_flag", True) for name in each.opts}
    kept: list[str] = []
    debug = takes = ended = False
    for word in words:
        if word == "--debug" and not takes and not ended:
            debug = True
            continue
        takes, ended = not takes and not ended and _dashed(word) in valued, ended or (word == "--" and not takes)
        kept.append(word)
    return kept, debug


def _dashed(word: str) -> str:
    return word.replace("_", "-")


def _message(error: Exception) -> str:
    text = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    return " ".join(text.split()).rstrip(".")
