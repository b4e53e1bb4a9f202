"""The second half of a build: lowered graphs to an engine for one device. Also what re-selects an engine elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.compiler.candidates import Pins, check_pins
from penstock.compiler.memory import Offsets, plan_memory
from penstock.compiler.progress import Progress
from penstock.compiler.select import Compiler, Selector, rows_to_json
from penstock.compiler.timing import time_cpu
from penstock.compiler.timing_cache import TimingCache
from penstock.compiler.workers import Workshop
from penstock.engine.device import Device
from penstock.engine.manifest import Engine, Weight
from penstock.engine.profile import Profile
from penstock.engine.program import KernelLaunch, Phase, Plan, Program, Site, Sizes
from penstock.errors import BuildError
from penstock.ir.graph import Graph
from penstock.kernels.compile import stored
from penstock.kernels.device import software
from penstock.kernels.tactic import PLAIN, TritonKernel


@dataclass(frozen=True)
class Unplanned:
    """Everything about an engine that does not depend on the device."""

    spec: Mapping[str, Any]
    profile: Profile
    format: str
    graphs: Mapping[str, Graph]  # phase -> lowered graph, in the order of a step
    weights: Mapping[str, Graph]  # name -> expression
    source: Mapping[str, Any]
    tokens: Mapping[str, Any]
    work: Mapping[str, float]
    report: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Planned:
    """An engine but for its weights file, with what was measured and where the compiled kernels lie."""

    engine: Engine
    timing: Mapping[str, Any]
    kernels: Path
    seconds: Mapping[str, float] = field(default_factory=dict)


def plan_engine(draft: Unplanned, device: Device, root: Path, pins: Pins, progress: Progress) -> Planned:
    """Choose by timing, plan every bucket, and lay out memory. `root`: the cache directory."""
    check_pins(pins)
    versions = software(device)
    cache = TimingCache.of(root, device, versions)
    folder = kernel_folder(root, device, versions)
    counts: dict[str, int] = {}

    def report(stage: str) -> None:
        counts[stage] = counts.get(stage, 0) + 1
        progress(stage, counts[stage], 0)

    with ExitStack() as stack:
        timer, compiler, roof = time_cpu, _compiles_nothing, dict[str, float]()
        if device.kind == "cuda":
            shop = stack.enter_context(Workshop(folder, device))
            timer, compiler, roof = shop.time, shop.compile, shop.roof(draft.format)
        selector = Selector(draft.profile, device, timer, compiler, cache, pins, report)
        try:
            selection = selector.run(tuple(draft.graphs.values()))
        finally:
            cache.save()
        program = _program(draft, selector, device)
        _compile_rest(program, selector, compiler, report)
    buffers, arena = _memory(program) if device.kind == "cuda" else ({}, 0)
    weights = _laid_out(draft, selector)
    facts = _kernel_facts(program, folder)
    engine = Engine(
        draft.spec, draft.profile, draft.format, device, versions, draft.source, {"decode": program}, weights,
        buffers, arena, facts, draft.tokens, draft.work, draft.report, roof=roof,
    )  # fmt: skip
    return Planned(engine, rows_to_json(selection), folder)


def kernel_folder(root: Path, device: Device, versions: Mapping[str, str]) -> Path:
    """Where compiled kernels are kept, by target and compiler: another version makes other binaries."""
    return root / "kernels" / f"sm{device.capability}-triton-{versions.get('triton', 'absent')}"


def _compile_rest(program: Program, selector: Selector, compiler: Compiler, report: Callable[[str], None]) -> None:
    """Kernels that only a bucket between the tuned ones needs. Raises BuildError where one does not compile."""
    refused = compiler(selector.kernels.values(), lambda: report("compile"))
    if failed := {key: reason for key, reason in refused.items() if key in _kernel_keys(program)}:
        raise BuildError(f"{len(failed)} kernels of buckets between the tuned ones do not compile: {failed}")


def _compiles_nothing(kernels: Iterable[TritonKernel], progress: Callable[[], None]) -> dict[str, str]:
    return {}


def _program(draft: Unplanned, selector: Selector, device: Device) -> Program:
    buckets = draft.profile.buckets() if device.kind == "cuda" else draft.profile.unpadded
    phases = {name: Phase(graph, _plans(graph, selector, buckets)) for name, graph in draft.graphs.items()}
    return Program(phases, buckets)


def _plans(graph: Graph, selector: Selector, buckets: Mapping[str, Sizes]) -> dict[str, dict[str, Plan]]:
    sites = {(s := Site.of(node)).key: s for node in graph.nodes if not node.is_leaf}
    return {key: {b: selector.plan(site, sizes) for b, sizes in buckets.items()} for key, site in sites.items()}


def _memory(program: Program) -> tuple[dict[str, Offsets], int]:
    planned = {b: plan_memory(program.phases, sizes, b) for b, sizes in program.buckets.items()}
    return {b: offsets for b, (offsets, _) in planned.items()}, max(top for _, top in planned.values())


def _laid_out(draft: Unplanned, selector: Selector) -> dict[str, Weight]:
    """Each weight with the layout that its readers were chosen with."""
    layouts: dict[str, str] = {}
    types = {}
    for graph in draft.graphs.values():
        for node in graph.nodes:
            for index, value in enumerate(node.inputs):
                if value.node.op == "weight":
                    types[value.node.name] = value.type
                    layouts[value.node.name] = selector.result.layouts[Site.of(node).key].get(index, PLAIN)
    return {name: Weight(types[name], layouts[name], expr) for name, expr in draft.weights.items()}


def _kernel_facts(program: Program, folder: Path) -> dict[str, Any]:
    binaries = {key: stored(folder, key) for key in sorted(_kernel_keys(program))}
    return {key: binary.facts() for key, binary in binaries.items() if binary is not None}


def _kernel_keys(program: Program) -> set[str]:
    """The kernels that some plan launches."""
    plans = (p for phase in program.phases.values() for by_bucket in phase.plans.values() for p in by_bucket.values())
    return {launch.kernel for plan in plans for launch in plan.launches if isinstance(launch, KernelLaunch)}
