"""`penstock inspect`: what is in an engine, why, and how far its parts are from the roof."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from penstock.cli import flags, inspect_nodes, layers
from penstock.cli.console import amount, duration, formats, result, result_json, table

Data = dict[str, Any]


def inspect(
    engine: flags.Engine,
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Only the operations, at every timed size, with all refusals.")
    ] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Only the graphs: as built, as fused, as run.")] = False,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", metavar="GB/S", help="Memory bandwidth that the roof is stated for.")
    ] = None,
    plugin: flags.Plugin = None,
    as_json: flags.Json = False,
) -> None:
    """Show spec, profile, passes, tactics with times, memory, and the roof of an engine."""
    from penstock.cli.inspect_report import report
    from penstock.engine import store
    from penstock.errors import OptionError

    if bandwidth is not None and not bandwidth > 0:
        raise OptionError(f"--bandwidth {bandwidth} must be positive; give GB/s, such as 4430 for an H200")
    data = report(engine, None if bandwidth is None else bandwidth * 1e9)
    drawn = store.drawing(engine) if graph else None
    if as_json:
        result_json(data if drawn is None else {**data, "graph": drawn})
        return
    parts = [inspect_nodes.everything(data)] if nodes else []
    parts += [drawn] if drawn else []
    result("\n\n".join(parts or _sections(data)))


def _sections(data: Data) -> list[str]:
    tell = (_head, _limits, _passes, inspect_nodes.where_time_goes, inspect_nodes.choices, _memory, _roof)
    return [section(data) for section in tell]


def _head(data: Data) -> str:
    spec, device, source = data["spec"], data["device"], data["source"]
    capability = device["capability"]
    made = ", ".join(f"{name} {version}" for name, version in data["software"].items())
    model = f"hidden {spec['hidden_size']}, vocabulary {spec['vocab_size']}, {spec['max_position']} positions"
    rows = [
        ("engine", data["engine"]),
        ("source", f"{source.get('model', 'not recorded')} ({source.get('weights', 'not recorded')})"),
        ("made for", f"{device['name']}{f' (sm_{capability})' if capability else ''} with {made}"),
        ("format", formats(data)),
        ("built in", ", ".join(f"{k} {v:.2f} s" for k, v in data["build_seconds"].items()) or "not recorded"),
        ("model", model + _result(spec)),
        *(("layers", layers.said(layer)) for layer in spec["layers"]),
        *(("plugin", _plugin(name, entry)) for name, entry in data["plugins"].items()),
    ]
    return table(rows, "")


def _result(spec: Data) -> str:
    if spec["task"] == "embed":
        return ", without a head: gives vectors"
    return ", head tied to the embedding" if spec["tied_head"] else ""


def _plugin(name: str, entry: Data) -> str:
    parts = ", ".join(f"{kind} {part}" for kind, names in entry["parts"].items() for part in names)
    return f"{name} {entry['version']}".strip() + f" ({entry['sources']}): {parts}"


def _limits(data: Data) -> str:
    profile, buckets = data["profile"], data["buckets"]
    shown = buckets if len(buckets) <= 6 else [*buckets[:3], f"... {len(buckets) - 5} more ...", *buckets[-2:]]
    rows = [(name, str(value)) for name, value in profile.items()]
    return "profile\n" + table([*rows, ("buckets", f"{len(buckets)}: {' '.join(shown)}")])


def _passes(data: Data) -> str:
    rows = [
        (
            r["pass"],
            f"{r['nodes'][0]} -> {r['nodes'][1]} nodes",
            ", ".join(f"{k} {v}x" for k, v in r["fired"].items() if v),
        )
        for r in data["passes"]
    ]
    return "passes (rules and how often they fired)\n" + table(rows)


def _memory(data: Data) -> str:
    memory = data["memory"]
    arenas = ", ".join(f"{name} {amount(size)}" for name, size in memory["arena_by_bucket"].items())
    layouts = ", ".join(f"{count} {name}" for name, count in memory["layouts"].items())
    rows = [
        ("weights", amount(memory["weights"]), layouts),
        ("arena", amount(memory["arena"]), arenas or "torch allocates as it goes"),
        (
            "slots",
            amount(memory["slots"]),
            "at " + ", ".join(f"{name} {at}" for name, at in memory["slot_fields"].items()),
        ),
        ("upload", amount(memory["upload"]), "at most, one a step"),
        ("KV", amount(memory["kv_per_token"]), f"a token, {amount(memory['kv_per_block'])} a block"),
        *_groups(memory),
        ("", amount(memory["kv_at_limits"]), "if every request of a full batch reached max_seq_len"),
    ]
    if "least" in memory:
        least, most = memory["least"], memory["at_most"]
        rows += [
            ("driver", amount(memory["graphs"] + memory["workspace"]), "captured graphs, library; about"),
            ("a run", amount(least), f"at least, by max_gpu_bytes; at most {amount(most)}; besides, the CUDA context"),
        ]
    return "memory\n" + table(rows)


def _groups(memory: Data) -> list[tuple[str, str, str]]:
    """Of each group of layers, where there are several, or state that is no KV."""
    groups, by_slot = memory["kv_groups"], memory["state_by_slot"]
    rows = [
        (
            name,
            amount(group["block"]),
            f"a block of {group['layers']} layers, at most {group['blocks_at_most']} a request",
        )
        for name, group in groups.items()
    ]
    return (rows if len(groups) > 1 else []) + [
        (name, amount(size), "a slot; prefixes are not found again, beams are refused")
        for name, size in by_slot.items()
    ]


def _experts(work: Mapping[str, float]) -> str:
    if "expert_bytes" not in work:
        return ""
    size, share = work["expert_bytes"], work["expert_share"]
    return f", for one token {amount(size * share)} of its experts' {amount(size)}"


def _roof(data: Data) -> str:
    work, roof = data["work"], data["roof"]
    flops = work["flops_per_token"] + work.get("flops_per_logit", 0.0)
    rate = f"at {amount(roof['bytes_per_s'])}/s"
    assumed = " (a round figure, not this device's: give --bandwidth; `penstock demo` measures it)"
    at = rate + (assumed if roof["assumed"] else "")
    lines = [
        "work and roof",
        f"  a step reads {amount(work['weight_bytes'])} of weights{_experts(work)}, and "
        f"{amount(work['kv_bytes_per_token'])} of KV for each position of context; "
        f"a token costs {amount(flops, 'FLOP')}",
        f"  {at} a step of one token takes at least {duration(roof['seconds_per_token'])}: "
        f"{roof['tokens_per_s']:.0f} tok/s, context not counted",
    ]
    if roof["timed_step_seconds"]:
        share = "" if roof["assumed"] or roof["share"] is None else f": {roof['share']:.0%} of the roof"
        took = duration(roof["timed_step_seconds"])
        lines.append(f"  the operations of {inspect_nodes.step(data)}, as timed one by one, take {took}{share}")
    return "\n".join(lines)
