"""What `penstock inspect` knows of an engine: plain data, from engine.json and timing.json alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penstock.cli import layers
from penstock.compiler.memory import plan_memory
from penstock.engine import store
from penstock.engine.groups import StateGroup
from penstock.engine.manifest import Engine
from penstock.engine.memory import least_budget, plan_run, request_bytes
from penstock.engine.profile import Profile
from penstock.engine.program import PLAIN, KernelLaunch, Phase, Plan, Site, bucket_name
from penstock.ir.ops.state import FIELDS, table_name

Data = dict[str, Any]
ALL = 1 << 60  # bytes: more than any device has
ASSUMED = 1e12  # bytes a second, for an engine that records no rate of its device; inspecting measures nothing


def report(directory: Path, bandwidth: float | None = None) -> Data:
    """Everything, for JSON and for the text. `bandwidth`: bytes a second of the roof; None: what the build measured.

    Raises EngineError where the directory is no engine, EngineCorruptError where a file is not what was written.
    """
    engine = store.load(directory)
    timing = store.timing(directory)
    program = engine.programs["decode"]
    plain = {name: program.phases[name] for name in PLAIN}  # the other tail runs only where it is asked for
    nodes = _shares([entry for name, phase in plain.items() for entry in _sites(engine, name, phase, timing)])
    return {
        "engine": str(directory),
        "format": engine.format,
        "kv_format": engine.kv_format,
        "device": asdict(engine.device),
        "software": dict(engine.software),
        "source": {key: engine.source[key] for key in ("model", "weights", "key") if key in engine.source},
        "build_seconds": dict(engine.build_seconds),
        "spec": _spec(engine),
        "profile": engine.profile.to_json(),
        "buckets": list(program.buckets),
        "passes": [dict(r) for r in engine.report],
        "nodes": nodes,
        "plugins": dict(engine.plugins),
        "kernels": {key: dict(facts) for key, facts in engine.kernels.items()},
        "memory": _memory(engine),
        "work": dict(engine.work),
        "roof": _roof(engine, nodes, bandwidth),
    }


def _spec(engine: Engine) -> Data:
    """The facts that people ask for first; engine.json has all of them."""
    spec = engine.model_spec
    return {
        "vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size, "max_position": spec.max_position,
        "tied_head": spec.tied_head,
        "task": "generate" if spec.head else "embed", "layers": layers.facts(spec),
    }  # fmt: skip


def _sites(engine: Engine, phase_name: str, phase: Phase, timing: Mapping[str, Any]) -> list[Data]:
    """One entry for each distinct operation of a phase, in the order of the graph."""
    counts = Counter(Site.of(node).key for node in phase.graph.nodes if not node.is_leaf)
    ops = {Site.of(node).key: node.op for node in phase.graph.nodes if not node.is_leaf}
    return [
        {
            "phase": phase_name, "op": ops[key], "site": key, "count": count,
            "plugin": _plugin(engine, "op", ops[key]),
            "choices": _choices(engine, ops[key], phase.plans[key], timing.get(key, {})),
            "cannot": timing.get(key, {}).get("cannot", {}),
        }
        for key, count in counts.items()
    ]  # fmt: skip


def _shares(nodes: list[Data]) -> list[Data]:
    """The same in the phases' order, within each by their part in the smallest timed step, with it: `step_us` is count
    x time there, None where nothing was timed; `share` is of the whole step.
    """
    for node in nodes:
        each = node["choices"][0]["median_us"] if node["choices"] else None
        node["step_us"] = None if each is None else node["count"] * each
    whole = sum(node["step_us"] or 0.0 for node in nodes)
    for node in nodes:
        node["share"] = node["step_us"] / whole if node["step_us"] else None
    phases = list(dict.fromkeys(node["phase"] for node in nodes))
    return sorted(nodes, key=lambda node: (phases.index(node["phase"]), -(node["step_us"] or 0.0)))


def _plugin(engine: Engine, kind: str, name: str) -> str | None:
    """The plugin that a part came from; None: it is ours."""
    return next((module for module, entry in engine.plugins.items() if name in entry["parts"].get(kind, ())), None)


def _choices(engine: Engine, op: str, plans: Mapping[str, Plan], timed: Mapping[str, Any]) -> list[Data]:
    """What runs at each timed size, with its time and its rivals'. A bucket between two sizes uses the larger."""
    points = timed.get("points", {})
    chosen: dict[tuple[str, str], Data] = {}  # a bucket that the fastest cannot run takes the next one
    for bucket, plan in plans.items():
        point = engine.profile.point(engine.programs["decode"].buckets[bucket], points) if points else bucket
        key = (point, plan.tactic)
        if key not in chosen:
            from_plugin = _plugin(engine, "tactic", f"{op}={plan.tactic.partition('{')[0]}")
            facts = _choice(engine, plan, points.get(point, {}))
            chosen[key] = {**facts, "plugin": from_plugin, "at": point, "buckets": []}
        chosen[key]["buckets"].append(bucket)
    return list(chosen.values())


def _choice(engine: Engine, plan: Plan, rivals: Mapping[str, Any]) -> Data:
    own = rivals.get(plan.tactic, {})
    timed = sorted((r["median_us"], name) for name, r in rivals.items() if "median_us" in r and name != plan.tactic)
    return {
        "tactic": plan.tactic,
        "median_us": own.get("median_us"),
        "spread_us": own.get("spread_us"),
        "instructions": instructions(engine, plan),
        "launches": len(plan.launches),
        "runners_up": [{"tactic": name, "median_us": median} for median, name in timed],
        "refused": {name: r["refused"] for name, r in rivals.items() if "refused" in r},
    }


def instructions(engine: Engine, plan: Plan) -> list[str]:
    """What multiplies in each launch: a stored kernel's wgmma, mma or fma, the library, or torch's reference."""
    names = {"cublas": "library", "reference": "torch"}
    return [
        engine.kernels[x.kernel].get("instruction") or "not noted"
        if isinstance(x, KernelLaunch)
        else names.get(x.name, x.name)
        for x in plan.launches
    ]


def _memory(engine: Engine) -> Data:
    """Bytes, and where the slots' fields lie (indices of 32-bit numbers)."""
    profile, slots = engine.profile, engine.profile.slots
    places = {name: slots.field(name) for name in FIELDS}
    places |= {
        "freqs": slots.freqs_at,
        **{table_name(group): slots.table_of(0, group) for group in range(slots.tables)},
        "controls": slots.controls_at,
        "history": slots.history_at,
    }
    return {
        "weights": engine.weight_bytes,
        "layouts": dict(Counter(w.layout for w in engine.weights.values())),
        "arena": engine.arena,
        "arena_by_bucket": _arenas(engine),
        "slots": 4 * slots.size,
        "slot_fields": places,
        "upload": 4 * profile.upload_size,
        "kv_per_token": engine.block_bytes / profile.block_size,
        "kv_per_block": engine.block_bytes,
        "kv_groups": {group.name: _group(group, profile) for group in engine.groups},
        "state_by_slot": {group.name: group.unit_bytes for group in engine.by_slot},
        "kv_at_limits": profile.max_batch_size * request_bytes(engine, profile),
        **_run(engine),
    }


def _group(group: StateGroup, profile: Profile) -> Data:
    """Bytes of a block over the group's layers; what one request holds at most."""
    most = group.blocks(profile.max_seq_len, profile.block_size, profile.max_num_tokens)
    return {"layers": len(group.states), "window": group.window, "block": group.unit_bytes, "blocks_at_most": most}


def _run(engine: Engine) -> dict[str, int]:
    """Of a GPU's engine, by the plan that a run prints: what the driver and the library take, and the least in all."""
    if engine.device.kind == "cpu":
        return {}
    plan = plan_run(engine, ALL)
    return {"graphs": plan.graphs, "workspace": plan.workspace, "least": least_budget(engine), "at_most": plan.total}


def _arenas(engine: Engine) -> dict[str, int]:
    """Of the largest bucket of each timed size; empty where torch allocates as it goes."""
    program, profile = engine.programs["decode"], engine.profile
    if not engine.buffers:
        return {}
    names = [bucket_name(t, profile.logit_buckets(t)[-1]) for t in profile.token_buckets if t in profile.tuned_buckets]
    return {name: plan_memory(program.phases, program.buckets[name], name)[1] for name in names}


def _roof(engine: Engine, nodes: list[Data], bandwidth: float | None) -> Data:
    """The least time of a step of one token by its bytes, beside what the operations of the smallest step took when
    they were timed, which is one of `timed_sizes`. `share` is there only where that step is of one token too.

    The rate is the one given, else what the build measured; `assumed`: it is neither, but a round figure.
    """
    known = bandwidth or engine.roof.get("read_bytes_per_s")
    rate = known or ASSUMED
    least = engine.step_bytes() / rate
    timed = min(engine.programs["decode"].buckets.values(), key=lambda sizes: sizes["T"])  # a CPU's is of more than one
    took = sum(node["step_us"] or 0.0 for node in nodes) / 1e6
    return {
        "bytes_per_s": rate, "assumed": known is None, "seconds_per_token": least, "tokens_per_s": 1 / least,
        "timed_step_seconds": took, "timed_tokens": timed["T"], "timed_sizes": dict(timed),
        "share": least / took if took and timed["T"] == 1 else None,
    }  # fmt: skip
