"""`penstock demo`: the bundled model through the whole path, each stage timed, and how far the end is from the roof."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli import flags
from penstock.cli.console import Progress, amount, result, say, table
from penstock.cli.session import open_llm, rates, stream

if TYPE_CHECKING:
    from penstock.engine.manifest import Engine
    from penstock.kernels.roof import Roof
    from penstock.runtime.requests import RequestOutput, SamplingParams

PROMPT, SEED, TOP_P = "In the beginning God created", 3, 0.95  # sampled: a small model's greedy text goes in circles
STAGES = {
    "read": "config, tensor headers, graph and passes",
    "select": "every tactic timed, the fastest chosen",
    "weights": "computed, packed, written",
}


def demo(
    prompt: Annotated[str, typer.Option("-p", "--prompt", metavar="TEXT", help="What the text begins with.")] = PROMPT,
    max_tokens: Annotated[int, typer.Option("--max_tokens", metavar="N", help="Most tokens to generate.")] = 160,
    temperature: Annotated[float, typer.Option("--temperature", metavar="X", help="0 is greedy.")] = 0.8,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="The same seed gives the same text.")] = SEED,
    device: flags.Device = "auto",
    cache_dir: flags.CacheDir = None,
) -> None:
    """Compile the bundled model, generate text with it, and show the time of each stage and the share of the roof."""
    from penstock.kernels.device import detect
    from penstock.kernels.roof import measure
    from penstock.runtime.requests import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=TOP_P, seed=seed)
    progress = Progress()
    with open_llm(None, progress, device=device, cache_dir=cache_dir) as llm:
        engine = llm.engine
        result(f"{_summary(engine)}\n  {llm.engine_dir}\n{_manner(params)}\n")
        llm.generate(prompt, SamplingParams(max_tokens=2, temperature=0.0))  # torch's own first-call costs
        result(prompt, end="")
        output = stream(llm, prompt, params)
    say("measuring the roof of this machine ...")
    roof = measure(detect(device), engine.format)
    result(f"\n{_stages(progress, engine, output)}\n\n{_distance(engine, roof, output)}")
    say("next: penstock generate -p TEXT, penstock chat, penstock inspect ENGINE")


def _summary(engine: Engine) -> str:
    from penstock.engine.program import PLAIN

    launches = [n for name in PLAIN for n in engine.programs["decode"].phases[name].graph.nodes if not n.is_leaf]
    fired = sum(sum(r["fired"].values()) for r in engine.report)
    layers = sum(run["count"] for run in engine.spec["layers"])
    return (
        f"engine: {layers} layers, {amount(engine.weight_bytes)} of weights in {engine.format} for "
        f"{engine.device.name}; {len(launches)} operations a step after {fired} rewrites"
    )


def _manner(params: SamplingParams) -> str:
    """How the text comes about, and what not to expect of it."""
    how = f"temperature {params.temperature:g}, seed {params.seed}" if params.temperature else "greedy"
    return (
        f"text: as it is generated, {how}; the bundled model is tiny and was trained for minutes,\n"
        "  so it has the manner of its books (a Bible, a dictionary, a manual, a jargon file) and no knowledge"
    )


def _stages(progress: Progress, engine: Engine, output: RequestOutput) -> str:
    """Stage, seconds, what it does. Stages of an engine found built show what they took when it was built."""
    cached = "cached" in progress.stages
    seconds = {**engine.build_seconds, **progress.seconds()}
    rows = [
        (name, _time(seconds[name], cached and name != "read"), about)
        for name, about in STAGES.items()
        if name in seconds
    ]
    opened = max(stage.latest for name, stage in progress.stages.items() if name != "ready")
    ready = progress.stages["ready"].latest
    first, rate = rates(output)
    count = len(output.outputs[0].token_ids)
    rows += [
        ("load", _time(ready - opened), "weights to the device, ready to run"),
        ("first token", _time(first), f"{len(output.prompt_token_ids)} tokens of prompt"),
        ("decode", _time((count - 1) / rate if rate else 0.0), f"{count - 1} tokens more, {rate:.1f} tok/s"),
    ]
    return table([("stage", "seconds", ""), *rows])


def _time(seconds: float, cached: bool = False) -> str:
    return f"{seconds:7.3f}" + (" when built" if cached else "")


def _distance(engine: Engine, roof: Roof, output: RequestOutput) -> str:
    """The decode rate against the roof measured a moment ago, at the mean length of the context."""
    rate = rates(output)[1]
    context = len(output.prompt_token_ids) + len(output.outputs[0].token_ids) / 2
    read, operations = token_cost(engine, context)
    limit = 1 / roof.seconds(read, operations)
    return (
        f"the roof: this machine reads {amount(roof.read_bytes_per_s)}/s and multiplies "
        f"{amount(roof.flops_per_s, 'FLOP')}/s;\na token needs {amount(read)} and {amount(operations, 'FLOP')}, "
        f"so at most {limit:.0f} tok/s; decoding reached {rate:.1f}, {rate / limit:.1%} of it.\n"
        f"Assumed: every weight comes from memory once a token, one request at a time, and nothing else takes time."
    )


def token_cost(engine: Engine, context: float) -> tuple[float, float]:
    """(bytes read, operations) of one decoded token behind `context` positions; attention's operations not counted."""
    work = engine.work
    read = engine.step_bytes() + context * work["kv_bytes_per_token"]
    return read, work["flops_per_token"] + work.get("flops_per_logit", 0.0)
