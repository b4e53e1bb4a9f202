"""`penstock run`: the last of the classic three steps, an engine directory and some texts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.cli import flags
from penstock.cli.console import Progress, result, result_json, say
from penstock.cli.session import open_llm
from penstock.errors import PromptError
from penstock.unsupported import require_default

if TYPE_CHECKING:
    from penstock.runtime.requests import RequestOutput


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
    store.load(engine_dir)  # not a directory to build from: this verb runs what is there
    with open_llm(str(engine_dir), Progress(), device=device) as llm:
        outputs = llm.generate(input_text, params)
    _show(outputs, as_json)


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
