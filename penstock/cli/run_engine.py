"""`penstock run`: the last of the classic three steps, an engine directory and some texts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli import flags
from penstock.cli.console import Progress, counted, result, result_json, say, table
from penstock.cli.session import open_llm
from penstock.cli.texts import facts, guided, sampling, scores, seconds
from penstock.errors import OptionError, PromptError
from penstock.unsupported import require_default

if TYPE_CHECKING:
    from penstock.runtime.requests import CompletionOutput, RequestOutput
    from penstock.runtime.values import Watch
    from penstock.text.tokenizer import Tokenizer

InputText = Annotated[list[str] | None, typer.Option("--input_text", metavar="TEXT", help="May be repeated.")]
DebugNodes = Annotated[
    str | None,
    typer.Option("--debug_nodes", metavar="NAME[,..]", help="Dump values by name or pattern: %6, logits, *norm*."),
]
DebugOutput = Annotated[
    Path | None,
    typer.Option("--debug_output", metavar="FILE", help="Where --debug_nodes puts them: nodes.safetensors."),
]
DebugSteps = Annotated[
    int | None,
    typer.Option("--debug_steps", metavar="N", help="How many of the first steps --debug_nodes looks into: 1."),
]
TpSize = Annotated[int, typer.Option("--tp_size", metavar="N", help="Ranks; 1 is built.")]
EngineDir = Annotated[Path, typer.Option("--engine_dir", metavar="DIR", help="An engine directory.")]
DUMP = "nodes.safetensors"  # where --debug_nodes puts values where nothing is said


def run(
    engine_dir: EngineDir,
    input_text: InputText = None,
    max_output_len: Annotated[int, typer.Option("--max_output_len", metavar="N", help="Most tokens for each.")] = 128,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = None,
    top_p: flags.TopP = None,
    seed: flags.Seed = None,
    n: flags.Texts = None,
    beams: flags.Beams = None,
    length_penalty: flags.LengthPenalty = None,
    min_tokens: flags.MinTokens = None,
    min_p: flags.MinP = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    presence_penalty: flags.PresencePenalty = None,
    frequency_penalty: flags.FrequencyPenalty = None,
    no_repeat_ngram_size: flags.NoRepeat = None,
    bad_words: flags.BadWords = None,
    logprobs: flags.Logprobs = None,
    guided_json: flags.GuidedJson = None,
    guided_regex: flags.GuidedRegex = None,
    guided_choice: flags.GuidedChoice = None,
    timeout: flags.Timeout = None,
    tp_size: TpSize = 1,
    device: flags.Device = "auto",
    max_batch_size: flags.BatchSize = None,
    max_num_tokens: flags.NumTokens = None,
    max_seq_len: flags.SeqLen = None,
    gpu_memory_utilization: flags.Utilization = 0.9,
    max_gpu_bytes: flags.GpuBytes = None,
    debug_nodes: DebugNodes = None,
    debug_output: DebugOutput = None,
    debug_steps: DebugSteps = None,
    plugin: flags.Plugin = None,
    as_json: flags.Json = False,
) -> None:
    """Run an engine on texts, all in one batch; each input is printed with its output."""
    require_default("tp_size", max(tp_size, _launched_ranks()), 1)
    if not input_text:
        raise PromptError("there is no text; give --input_text TEXT, once for each prompt")
    dump = _dump_to(debug_nodes, debug_output, debug_steps)
    params = sampling(
        n, beams, length_penalty, max_tokens=max_output_len, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=seed, min_tokens=min_tokens, min_p=min_p, repetition_penalty=repetition_penalty, logprobs=logprobs,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, bad_words=bad_words,
        no_repeat_ngram_size=no_repeat_ngram_size, guided_decoding=guided(guided_json, guided_regex, guided_choice),
    )  # fmt: skip
    limit = seconds("--timeout", timeout)
    steps = 1 if debug_steps is None else debug_steps
    _check_engine(engine_dir, debug_nodes, steps)
    arguments: dict[str, Any] = {
        "max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "max_seq_len": max_seq_len,
        "gpu_memory_utilization": gpu_memory_utilization, "max_gpu_bytes": max_gpu_bytes, "device": device,
    }  # fmt: skip
    with open_llm(str(engine_dir), Progress(), **arguments) as llm:
        watch = llm.watch(debug_nodes.split(","), steps) if debug_nodes else None
        outputs, tokenizer = llm.generate(input_text, params, timeout=limit), llm.tokenizer
    if watch is not None:
        _keep(watch, dump)
    _show(outputs, tokenizer, as_json)


def _keep(watch: Watch, dump: Path) -> None:
    watch.save(dump)
    say(f"{_seen(watch)}\n[{counted(len(watch.seen), 'value')} written to {dump}]")


def _dump_to(nodes: str | None, output: Path | None, steps: int | None) -> Path:
    """Where the values go. Raises OptionError before any work, for flags that need --debug_nodes or no directory."""
    from penstock.runtime.values import require_folder

    if not nodes:
        for flag, value in (("--debug_nodes", nodes), ("--debug_output", output), ("--debug_steps", steps)):
            if value is not None:
                raise OptionError(f"{flag} {str(value)!r} dumps nothing without names; give --debug_nodes NAME,..")
    path = output or Path(DUMP)
    if nodes:
        require_folder(path)
    return path


def _check_engine(engine_dir: Path, nodes: str | None, steps: int) -> None:
    """Raises EngineError for a directory to build from: this verb runs what is there. OptionError for names or steps
    that cannot be watched, before any weight is read."""
    from penstock.engine import store

    if nodes:
        from penstock.runtime.values import Watch

        Watch(store.load(engine_dir), nodes.split(","), steps)
    elif not store.is_engine(engine_dir):
        store.load(engine_dir)  # says so


def _seen(watch: Watch) -> str:
    """A line for each value."""
    rows = [("value", "op", "type", "min", "max", "mean", "NaN", "inf")]
    for seen in (seen.facts() for seen in watch.seen):
        type = f"{seen['dtype']}[{','.join(map(str, seen['shape']))}]"
        numbers = ["-" if seen[k] is None else f"{seen[k]:.4g}" for k in ("min", "max", "mean")]
        wrong = str(seen["nan"]), str(seen["inf"])
        rows.append((seen["name"], " ".join((seen["op"], *seen["results"])), type, *numbers, *wrong))
    return table(rows)


def _launched_ranks() -> int:
    """How many ranks mpirun or torchrun started: each would run the whole model beside the others, and say nothing."""
    counts = (os.environ.get("OMPI_COMM_WORLD_SIZE"), os.environ.get("WORLD_SIZE"))
    return max(int(count) if count and count.isdigit() else 1 for count in counts)


def _show(outputs: list[RequestOutput], tokenizer: Tokenizer | None, as_json: bool) -> None:
    if as_json:
        result_json([{"input_text": output.prompt, **facts(output, tokenizer)} for output in outputs])
        return
    for index, output in enumerate(outputs):
        result(f'Input [Text {index}]: "{output.prompt}"')
        for done in output.outputs:
            result(_line(index, done, len(output.outputs)))
            if rows := scores(done, tokenizer):
                result(rows)
    tokens = sum(len(done.token_ids) for output in outputs for done in output.outputs)
    say(f"[{counted(tokens, 'token')} generated for {counted(len(outputs), 'text')}]")


def _line(index: int, done: CompletionOutput, count: int) -> str:
    """The classic words; of several sampled texts the number, of beams the score behind it."""
    which = "Seq" if done.score is None and count > 1 else "Beam"
    score = "" if done.score is None else f" (score {done.score:.4f})"
    return f'Output [Text {index} {which} {done.index}]: "{done.text}"{score}'
