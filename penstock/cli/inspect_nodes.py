"""The operations of an engine as text: where the time of a step goes, what runs each, and what lost against it."""

from __future__ import annotations

import re
from typing import Any

from penstock.cli.console import duration, table
from penstock.ir.ops.fused import PRODUCTS

Data = dict[str, Any]
NEAREST = 2  # runners-up shown in the short form
WIDTH = 100  # characters of an operation's types in the short form
REPEATED = re.compile(r"([\w.]+\[[^\]]*\]!?)((?:, \1(?![\[\w!]))+)")
MATRIX = re.compile(r"\w+\[\d+,\d+\]!")
LEGEND = """\
  T tokens, S sequences, L rows of logits, U numbers of the upload, M blocks in a row of the block table,
  N blocks of KV; ! a weight; 3*: three of that type. T8, L8: timed at that T or L; any: once for all.
  Tactics: reference is the op's definition in PyTorch, parts runs a fused op as the ops that it was made of, the
  others are kernels. In [ ] what multiplies in each launch: wgmma and mma are matrix instructions, fma is none,
  library is the vendor's, torch is PyTorch."""


def step(data: Data) -> str:
    """The step whose operations were timed, in words."""
    sizes = data["roof"]["timed_sizes"]
    if sizes["T"] == 1:
        return "a step of one token"
    return f"a step of T {sizes['T']}, S {sizes['S']}, L {sizes['L']} (tokens, sequences, rows of logits)"


def where_time_goes(data: Data) -> str:
    """Each op and tactic with its part of the smallest timed step, the largest first; products by their matrix."""
    sums: dict[tuple[str, str], tuple[int, float]] = {}
    for node in data["nodes"]:
        key = (_called(node), node["choices"][0]["tactic"].partition("{")[0])  # its parameters are in the listing
        count, took = sums.get(key, (0, 0.0))
        sums[key] = (count + node["count"], took + (node["step_us"] or 0.0))
    whole = sum(took for _, took in sums.values())
    if not whole:
        return "where the time goes: nothing was timed"
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])
    rows = [
        (f"{took / whole:6.1%}", duration(took / 1e6), f"{count} x {name}", tactic)
        for (name, tactic), (count, took) in ranked
    ]
    return f"where the time of {step(data)} goes, each operation timed alone\n" + table(rows)


def _called(node: Data) -> str:
    matrices = MATRIX.findall(node["site"]) if node["op"] in PRODUCTS else ()
    return " ".join([str(node["op"]), *matrices])


def choices(data: Data) -> str:
    """The short form: the smallest and the largest timed size of each operation."""
    return _listing(data, whole=False)


def everything(data: Data) -> str:
    """Every timed size, runner-up and refusal."""
    return _listing(data, whole=True)


def _listing(data: Data, whole: bool) -> str:
    lines = [
        "operations by phase, the costliest first: count x time, share of the step; what was chosen; what was slower"
    ]
    lines.append(LEGEND)
    phase = ""
    for node in data["nodes"]:
        if node["phase"] != phase:
            phase = node["phase"]
            lines.append(f"  {phase}")
        lines += _node(node, whole)
    return "\n".join(lines)


def _node(node: Data, whole: bool) -> list[str]:
    found = node["choices"]
    few = found if whole or len(found) < 2 else [found[0], found[-1]]
    head = f"    {_cost(node)}  {node['site'] if whole else shortened(node['site'])}"
    cannot = [f"        {name} cannot: {why}" for name, why in node["cannot"].items()] if whole else []
    head += _of(node)
    return [head, *(f"        {_choice(choice, whole)}" for choice in few), *cannot]


def _of(part: Data) -> str:
    """Whose it is, where it is not ours."""
    return f" (plugin {part['plugin']})" if part["plugin"] else ""


def _cost(node: Data) -> str:
    if node["step_us"] is None:
        return f"{node['count']} x not timed"
    each = _time(node["choices"][0]["median_us"])
    total = f" = {_time(node['step_us'])}" if node["count"] > 1 else ""
    return f"{node['count']} x {each}{total}, {node['share'] or 0.0:.1%}"


def _choice(choice: Data, whole: bool) -> str:
    timed = choice["median_us"] is not None
    took = f"{_time(choice['median_us'])} (+-{_time(choice['spread_us'])})" if timed else "not timed"
    rivals = choice["runners_up"] if whole else choice["runners_up"][:NEAREST]
    others = "".join(f"; {rival['tactic']} {_time(rival['median_us'])}" for rival in rivals)
    refused = "".join(f"; {name} refused: {why}" for name, why in choice["refused"].items()) if whole else ""
    what, by = f"{choice['tactic']}{_of(choice)}", ", ".join(choice["instructions"])
    return f"{choice['at']:>6}  {what}  {took}  [{by}]{others}{refused}"


def shortened(site: str) -> str:
    """Types that follow each other counted, and what is still too long cut."""
    text = REPEATED.sub(lambda m: f"{1 + m[2].count(m[1])}*{m[1]}", site)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 4]} ..."


def _time(us: float) -> str:
    return duration(us / 1e6)
