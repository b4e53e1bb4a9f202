"""`penstock profile`: one step as a timeline by node, and a statement of what it loses and where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from penstock.cli import flags
from penstock.cli.console import amount, duration, result, result_json, say, table

if TYPE_CHECKING:
    from penstock.bench.timeline import Loss, NodeTime, Timeline

CONTEXT = 128  # tokens before a decode row where nothing is said
WORST = 4  # losses named in the last sentence


def profile(
    engine: flags.Engine,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Sequences in the step.")] = 1,
    context: Annotated[
        int | None,
        typer.Option("--context", metavar="N", help="Tokens before it in each; default 128, of a prompt 0."),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt_tokens", metavar="N", help="Tokens of each in the step; 1 decodes.")
    ] = 1,
    temperature: Annotated[float, typer.Option("--temperature", metavar="X", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top_k", metavar="N", help="Sample from the N likeliest; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option("--top_p", metavar="P", help="Sample from the likeliest to sum to P.")] = 1.0,
    nodes: Annotated[bool, typer.Option("--nodes", help="Every node on a line of its own, equal layers too.")] = False,
    plugin: flags.Plugin = None,
    as_json: flags.Json = False,
) -> None:
    """Show one step of an engine as a timeline by node with its gaps, and say what the step loses and where.

    On a GPU the step is a replay, seen by CUPTI; on a CPU each node is timed as it runs.
    """
    from penstock.bench.timeline import timeline
    from penstock.engine import store
    from penstock.runtime.batch import Batch
    from penstock.runtime.open import Memory
    from penstock.runtime.requests import SamplingParams

    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)  # refuses what a run refuses
    opened = store.load(engine)
    longest = opened.profile.max_seq_len - prompt_tokens - 1
    before = context if context is not None else 0 if prompt_tokens > 1 else max(0, min(CONTEXT, longest))
    asked = Batch(batch, before, prompt_tokens, temperature, top_k, top_p)
    line = timeline(opened, engine, asked, Memory(), say)
    if as_json:
        result_json(line.facts())
    else:
        result("\n\n".join([_head(line), _timeline(line, nodes), _summary(line), _statement(line)]))


def _head(line: Timeline) -> str:
    batch = line.batch
    each = "1 token" if batch.tokens == 1 else f"{batch.tokens} tokens"
    why = f" ({line.why})" if line.why else ""
    return (
        f"a step of {batch.rows} x {each} behind {batch.context}, in bucket {line.bucket}\n"
        f"nodes timed by {line.how}{why}\n"
        f"roof: {amount(line.roof.read_bytes_per_s)}/s, {amount(line.roof.flops_per_s, 'FLOP')}/s"
    )


def _timeline(line: Timeline, every: bool) -> str:
    """In the order of the step; a run of nodes that repeats stands once, with its means."""
    from penstock.bench.timeline import Run, fold

    keys = [(n.phase, n.site, n.tactic) for n in line.nodes]
    runs = [Run(i, 1, 1) for i in range(len(keys))] if every else list(fold(keys))
    rows: list[tuple[str, ...]]
    rows = [("start", "node", "op", "tactic", "time", "gap", "overlap", "moves", "rate", "of roof")]
    for run in runs:
        if run.count > 1:
            rows.append(("", f"{run.count} times, the mean of each:"))
        for i in range(run.start, run.start + run.length):
            rows.append(_row(line.nodes[i : i + run.length * run.count : run.length]))
    return "timeline (us; gap: nothing ran before it; overlap: started before its predecessor ended)\n" + table(rows)


def _row(nodes: tuple[NodeTime, ...]) -> tuple[str, ...]:
    first, count = nodes[0], len(nodes)
    busy, gap, overlap = (sum(getattr(n, f"{x}_us") for n in nodes) / count for x in ("busy", "gap", "overlap"))
    tactic = first.tactic.partition("{")[0]  # --json has its parameters
    return (
        f"{first.start_us:8.1f}", f"{first.phase}/{first.name}", first.site, tactic, f"{busy:8.2f}",
        f"{gap:6.2f}" if gap >= 0.005 else "", f"{overlap:6.2f}" if overlap >= 0.005 else "", amount(first.bytes),
        _rate(first.bytes, first.flops, busy), f"{first.roof_us / busy:7.0%}" if busy else "",
    )  # fmt: skip


def _rate(moved: float, flops: float, us: float) -> str:
    """Bytes a second, or operations where they are many to a byte."""
    if not us:
        return ""
    if flops > 100 * moved:
        return f"{amount(flops / us * 1e6, 'FLOP')}/s"
    return f"{amount(moved / us * 1e6)}/s"


def _summary(line: Timeline) -> str:
    from penstock.bench.timeline import losses

    rows = [("share", "time", "count x op", "tactic", "rate", "of roof", "lost", "gaps")]
    for loss in losses(line):
        rows.append((
            f"{(loss.busy_us + loss.gap_us) / line.seen_us:6.1%}", duration(loss.busy_us / 1e6),
            f"{loss.count} x {loss.op}", loss.tactic, _rate(loss.bytes, loss.flops, loss.busy_us), f"{loss.share:7.0%}",
            _us(loss.lost_us), _us(loss.gap_us),
        ))  # fmt: skip
    return "by operation, what loses most first\n" + table(rows)


def _statement(line: Timeline) -> str:
    from penstock.bench.timeline import losses

    worst = [loss for loss in losses(line) if loss.lost_us > 0][:WORST]
    parts = [f"{_us(line.gap_us)} in gaps between launches", *map(_loss, worst)]
    share = f": {line.roof_us / line.step_us:.0%} of the roof" if line.step_us else ""
    looked = line.seen_us - line.step_us
    seen = f"looked at, the step took {_us(line.seen_us)}, {_us(abs(looked))} {'more' if looked >= 0 else 'less'}"
    noise = "" if looked >= 0 else ": the noise between two measurements"
    return (
        f"the step takes {_us(line.step_us)}; its roof, one operation after another, is {_us(line.roof_us)}{share}\n"
        f"lost: {_us(line.step_us - line.roof_us)}; as the nodes were seen: {', '.join(parts)}\n{seen}{noise}"
    )


def _loss(loss: Loss) -> str:
    return f"{_us(loss.lost_us)} in {loss.count} x {loss.op} ({loss.share:.0%} of its roof)"


def _us(us: float) -> str:
    """-0.3 and 12.5 us, 3.41 ms."""
    return f"{us:.1f} us" if abs(us) < 1000 else f"{us / 1e3:.3g} ms"
