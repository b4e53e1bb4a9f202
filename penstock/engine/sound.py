"""What a manifest must hold beside the right types, so that no reader of it meets a gap later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from penstock.engine.program import CONTROLLED_TAIL, DECODE, ENCODE, FRONT, PLAIN, KernelLaunch, Phase, Program
from penstock.engine.timings import is_number

if TYPE_CHECKING:
    from penstock.engine.manifest import Engine

ROOF = {"read_bytes_per_s", "flops_per_s"}
WORK = {"weight_bytes", "flops_per_token", "flops_per_logit", "kv_bytes_per_token"}
PREFIX = {"end", "marks"}
RECORDS = ("spec", "software", "source", "tokens", "kernels", "work", "build_seconds", "roof", "buffers")


def flaws(engine: Engine) -> Iterator[str]:
    """Field by field, what is wrong there; a reader stops at the first. May raise what reading a wrong type raises."""
    yield from (f"{name}: no record" for name in RECORDS if not isinstance(getattr(engine, name), Mapping))
    _ = engine.model_spec  # raises where it is none
    if engine.device.kind not in ("cpu", "cuda") or not _are_integers(engine.device.capability, engine.arena):
        yield "device or arena"
    if not _is_tokens(engine.tokens):
        yield "tokens: eos is a list of ids, generation a record"
    work, roof = engine.work, engine.roof
    if not (work.keys() >= WORK and all(map(is_number, work.values())) and work["weight_bytes"]):
        yield f"work: {', '.join(sorted(WORK))} are numbers, and weight_bytes is not 0"
    if roof and not (roof.keys() == ROOF and all(is_number(rate) and rate for rate in roof.values())):
        yield f"roof: {' and '.join(sorted(ROOF))} are positive numbers, or there is none"
    if not all(map(is_number, engine.build_seconds.values())):
        yield "build_seconds: numbers"
    if not all(_is_pass(each) for each in engine.report):
        yield "report: each pass has its name, two counts of nodes, and what fired"
    if DECODE not in engine.programs:
        yield f"programs: there is no {DECODE!r}"
    if ENCODE in engine.programs and not engine.tokens.get("decoder_start"):
        yield "tokens: decoder_start is a list of ids, at least one, where there is a program 'encode'"
    prefix = engine.tokens.get("prefix") or {}
    if engine.reads_prefix and not (prefix.keys() == PREFIX and prefix["marks"]):
        yield "tokens: prefix has an id `end` and a list of ids `marks` where a prompt's first tokens see each other"
    for name, program in engine.programs.items():
        if name not in (DECODE, ENCODE):
            yield f"programs: {name!r} is none that is known"
        yield from _of_program(engine, program, (*PLAIN, CONTROLLED_TAIL) if name == DECODE else FRONT)


def _of_program(engine: Engine, program: Program, needed: Sequence[str]) -> Iterator[str]:
    yield from (f"programs: there is no phase {name!r}" for name in needed if name not in program.phases)
    if not program.buckets or not all(_are_integers(s["T"], s["S"], s["L"]) for s in program.buckets.values()):
        yield "programs: buckets have integers T, S and L"
    tables, by_slot = len(engine.groups), bool(engine.by_slot)  # raises where a state's group is none
    if engine.profile.tables != max(1, tables) or engine.profile.slot_rows != by_slot:
        yield f"profile: tables={engine.profile.tables}, and the states have {tables} groups with blocks; or slot_rows"
    for name, phase in program.phases.items():
        yield from (f"programs: {name} {what}" for what in _of_phase(engine, phase, program))
        for bucket in program.buckets if engine.buffers or engine.device.kind == "cuda" else ():
            offsets = engine.buffers.get(bucket, {}).get(name, ())
            if len(offsets) != _buffers(phase) or not _are_integers(*offsets):
                yield f"buffers: bucket {bucket} lacks some of {name}"


def _of_phase(engine: Engine, phase: Phase, program: Program) -> Iterator[str]:
    for leaf in phase.graph.leaves("weight"):
        if leaf.name not in engine.weights:
            yield f"reads the weight {leaf.name!r}, which weights lacks"
    for site in phase.sites:
        plans = phase.plans.get(site, {})
        if missing := program.buckets.keys() - plans.keys():
            yield f"has no plan for {site!r} in bucket {min(missing)}"
        for name in {x.kernel for plan in plans.values() for x in plan.launches if isinstance(x, KernelLaunch)}:
            if not isinstance(engine.kernels.get(name), Mapping):
                yield f"launches the kernel {name!r}, which kernels lacks"


def _buffers(phase: Phase) -> int:
    """Of a bucket: one for each value that is computed, and one for each node's workspace."""
    return sum(len(node.types) + 1 for node in phase.graph.nodes if not node.is_leaf)


def _is_tokens(tokens: Mapping[str, Any]) -> bool:
    prefix = tokens.get("prefix") or {}
    lists = [tokens.get("eos", []), tokens.get("decoder_start", []), [tokens.get("forced_end") or 0]]
    lists += [prefix.get("marks", []), [prefix.get("end", 0)]]
    fit = all(isinstance(each, list) and _are_integers(*each) for each in lists)
    return fit and isinstance(tokens.get("generation", {}), Mapping)


def _is_pass(entry: Any) -> bool:
    before, after = entry["nodes"]
    return isinstance(entry["pass"], str) and _are_integers(before, after, *entry["fired"].values())


def _are_integers(*values: object) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)
