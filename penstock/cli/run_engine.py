"""`penstock run`: the last of the classic three steps, an engine directory and some texts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli import flags
from penstock.cli.console import Progress, result, result_json, say, table
from penstock.cli.session import open_llm
from penstock.errors import PromptError
from penstock.unsupported import require_default

if TYPE_CHECKING:
    from penstock.runtime.requests import RequestOutput
    from penstock.runtime.values import Watch


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
        typer.Option("--debug_nodes", metavar="NAME[,..]", help="Dump values by name or pattern: %12, logits, *norm*."),
    ] = None,
    debug_output: Annotated[
        Path, typer.Option("--debug_output", metavar="FILE", help="Where --debug_nodes puts them.")
    ] = Path("nodes.safetensors"),
    debug_steps: Annotated[
        int, typer.Option("--debug_steps", metavar="N", help="How many of the first steps --debug_nodes looks into.")
    ] = 1,
    plugin: flags.Plugin = None,
    as_json: flags.Json = False,
) -> None:
    """Run an engine on texts, all in one batch; each input is printed with its output."""
    require_default("tp_size", max(tp_size, _launched_ranks()), 1)
    if not input_text:
        raise PromptError("there is no text; give --input_text TEXT, once for each prompt")
    from penstock.engine import store
    from penstock.runtime.requests import SamplingParams

    params = SamplingParams(max_tokens=max_output_len, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    flags.load_plugins(plugin)
    if not store.is_engine(engine_dir):  # not a directory to build from: this verb runs what is there
        store.load(engine_dir)  # says so
    arguments: dict[str, Any] = {
        "max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "max_seq_len": max_seq_len,
        "gpu_memory_utilization": gpu_memory_utilization, "max_gpu_bytes": max_gpu_bytes, "device": device,
    }  # fmt: skip
    with open_llm(str(engine_dir), Progress(), **arguments) as llm:
        watch = llm.watch(debug_nodes.split(","), debug_steps) if debug_nodes is not None else None
        outputs = llm.generate(input_text, params)
    if watch is not None:
        watch.save(debug_output)
        say(_seen(watch))
        say(f"[{len(watch.seen)} values are in {debug_output}]")
    _show(outputs, as_json)


def _seen(watch: Watch) -> str:
    """A line for each value."""
    rows = [("value", "op", "type", "min", "max", "mean", "")]
    for facts in (seen.facts() for seen in watch.seen):
        type = f"{facts['dtype']}[{','.join(map(str, facts['shape']))}]"
        numbers = ["-" if facts[k] is None else f"{facts[k]:.4g}" for k in ("min", "max", "mean")]
        wrong = ", ".join(f"{facts[k]} {k}" for k in ("nan", "inf") if facts[k])
        rows.append((facts["name"], " ".join((facts["op"], *facts["results"])), type, *numbers, wrong))
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
    say(f"[{sum(len(o.outputs[0].token_ids) for o in outputs)} tokens generated for {len(outputs)} texts]")


def _facts(output: RequestOutput) -> dict[str, Any]:
    done = output.outputs[0]
    return {
        "input_text": output.prompt,
        "text": done.text,
        "token_ids": list(done.token_ids),
        "finish_reason": done.finish_reason,
    }
