"""`penstock run`: the last of the classic three steps, an engine directory and some texts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli import flags
from penstock.cli.console import Progress, counted, result, result_json, say, table
from penstock.cli.session import open_llm
from penstock.errors import OptionError, PromptError
from penstock.unsupported import require_default

if TYPE_CHECKING:
    from penstock.runtime.requests import RequestOutput
    from penstock.runtime.values import Watch

DUMP = "nodes.safetensors"  # where --debug_nodes puts values where nothing is said


def run(
    engine_dir: Annotated[Path, typer.Option("--engine_dir", metavar="DIR", help="An engine directory.")],
    input_text: Annotated[
        list[str] | None, typer.Option("--input_text", metavar="TEXT", help="May be repeated.")
    ] = None,
    max_output_len: Annotated[int, typer.Option("--max_output_len", metavar="N", help="Most tokens for each.")] = 128,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = None,
    top_p: flags.TopP = None,
    seed: flags.Seed = None,
    tp_size: Annotated[int, typer.Option("--tp_size", metavar="N", help="Ranks; 1 is built.")] = 1,
    device: flags.Device = "auto",
    max_batch_size: flags.BatchSize = None,
    max_num_tokens: flags.NumTokens = None,
    max_seq_len: flags.SeqLen = None,
    gpu_memory_utilization: flags.Utilization = 0.9,
    max_gpu_bytes: flags.GpuBytes = None,
    debug_nodes: Annotated[
        str | None,
        typer.Option("--debug_nodes", metavar="NAME[,..]", help="Dump values by name or pattern: %6, logits, *norm*."),
    ] = None,
    debug_output: Annotated[
        Path | None,
        typer.Option("--debug_output", metavar="FILE", help="Where --debug_nodes puts them: nodes.safetensors."),
    ] = None,
    debug_steps: Annotated[
        int | None,
        typer.Option("--debug_steps", metavar="N", help="How many of the first steps --debug_nodes looks into: 1."),
    ] = None,
    plugin: flags.Plugin = None,
    as_json: flags.Json = False,
) -> None:
    """Run an engine on texts, all in one batch; each input is printed with its output."""
    require_default("tp_size", max(tp_size, _launched_ranks()), 1)
    if not input_text:
        raise PromptError("there is no text; give --input_text TEXT, once for each prompt")
    dump = _dump_to(debug_nodes, debug_output, debug_steps)
    from penstock.engine import store
    from penstock.runtime.requests import SamplingParams

    params = SamplingParams(max_tokens=max_output_len, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    flags.load_plugins(plugin)
    if not store.is_engine(engine_dir):  # not a directory to build from: this verb runs what is there
        store.load(engine_dir)  # says so
    steps = 1 if debug_steps is None else debug_steps
    if debug_nodes:
        _check_watched(engine_dir, debug_nodes, steps)
    arguments: dict[str, Any] = {
        "max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "max_seq_len": max_seq_len,
        "gpu_memory_utilization": gpu_memory_utilization, "max_gpu_bytes": max_gpu_bytes, "device": device,
    }  # fmt: skip
    with open_llm(str(engine_dir), Progress(), **arguments) as llm:
        watch = llm.watch(debug_nodes.split(","), steps) if debug_nodes else None
        outputs = llm.generate(input_text, params)
    if watch is not None:
        watch.save(dump)
        say(_seen(watch))
        say(f"[{counted(len(watch.seen), 'value')} written to {dump}]")
    _show(outputs, as_json)


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


def _check_watched(engine_dir: Path, nodes: str, steps: int) -> None:
    """Raises OptionError for names or steps that cannot be watched, before any weight is read."""
    from penstock.engine import store
    from penstock.runtime.values import Watch

    Watch(store.load(engine_dir), nodes.split(","), steps)


def _seen(watch: Watch) -> str:
    """A line for each value."""
    rows = [("value", "op", "type", "min", "max", "mean", "NaN", "inf")]
    for facts in (seen.facts() for seen in watch.seen):
        type = f"{facts['dtype']}[{','.join(map(str, facts['shape']))}]"
        numbers = ["-" if facts[k] is None else f"{facts[k]:.4g}" for k in ("min", "max", "mean")]
        wrong = str(facts["nan"]), str(facts["inf"])
        rows.append((facts["name"], " ".join((facts["op"], *facts["results"])), type, *numbers, *wrong))
    return table(rows)


def _launched_ranks() -> int:
    """How many ranks mpirun or torchrun started: each would run the whole model beside the others, and say nothing."""
    counts = (os.environ.get("OMPI_COMM_WORLD_SIZE"), os.environ.get("WORLD_SIZE"))
    return max(int(count) if count and count.isdigit() else 1 for count in counts)


def _show(outputs: list[RequestOutput], as_json: bool) -> None:
    if as_json:
        result_json([_facts(output) for output in outputs])
        return
    for index, output in enumerate(outputs):
        result(f'Input [Text {index}]: "{output.prompt}"\nOutput [Text {index} Beam 0]: "{output.outputs[0].text}"')
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    say(f"[{counted(tokens, 'token')} generated for {counted(len(outputs), 'text')}]")


def _facts(output: RequestOutput) -> dict[str, Any]:
    done = output.outputs[0]
    return {
        "input_text": output.prompt,
        "text": done.text,
        "token_ids": list(done.token_ids),
        "finish_reason": done.finish_reason,
    }
