"""The second half of a build: lowered graphs to an engine for one device. Also what re-selects an engine elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock import plugins
from penstock.compiler.candidates import Pins, check_pins
from penstock.compiler.memory import Lifetimes, Offsets, plan_memory
from penstock.compiler.phases import check_prepared
from penstock.compiler.progress import Progress
from penstock.compiler.select import Compiler, NoCompiler, Selector, rows_to_json
from penstock.compiler.timing import time_cpu
from penstock.compiler.timing_cache import TimingCache
from penstock.compiler.workers import Workshop
from penstock.engine.device import Device
from penstock.engine.manifest import Engine, Weight
from penstock.engine.match import COMPILES_ONLY
from penstock.engine.profile import Profile
from penstock.engine.program import DECODE, ENCODE, Call, KernelLaunch, Phase, Plan, Program, Site, Sizes
from penstock.errors import BuildError
from penstock.ir.graph import Graph, Type
from penstock.kernels.compile import stored
from penstock.kernels.device import software
from penstock.kernels.tactic import PLAIN


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
    family: str = ""  # that read the model's config
    encode: Mapping[str, Graph] = field(default_factory=dict)  # the phases of an encoder's run, where there is one

    @property
    def programs(self) -> dict[str, Mapping[str, Graph]]:
        """The phases of each."""
        return {DECODE: self.graphs, **({ENCODE: self.encode} if self.encode else {})}

    @property
    def every(self) -> tuple[Graph, ...]:
        """The phases of all programs, one after another."""
        return tuple(graph for phases in self.programs.values() for graph in phases.values())

    def parts(self) -> Iterator[plugins.Part]:
        """What it is made with and of: the family, passes that fired, ops and formats."""
        yield "family", self.family
        yield from (("pass", each["pass"]) for each in self.report if any(each["fired"].values()))
        for node in (n for graph in (*self.every, *self.weights.values()) for n in graph.nodes):
            yield "op", node.op
            yield from (("format", type.format.name) for type in node.types)


@dataclass(frozen=True)
class Planned:
    """An engine but for its weights file, with what was measured and where the compiled kernels lie."""

    engine: Engine
    timing: Mapping[str, Any]
    kernels: Path
    seconds: Mapping[str, float] = field(default_factory=dict)


Programs = Mapping[str, Program]
Early = Callable[[Mapping[str, Weight]], None]


def open_shop(device: Device, root: Path) -> AbstractContextManager[Workshop | None]:
    """The processes that compile and time, all starting; None on a CPU. `root`: the cache directory."""
    if device.kind == "cpu":
        return nullcontext()
    return Workshop(kernel_folder(root, device, software(device)), device)


def plan_engine(
    draft: Unplanned, device: Device, root: Path, pins: Pins, progress: Progress, shop: Workshop | None = None,
    early: Early | None = None,
) -> Planned:  # fmt: skip
    """Choose by timing, plan every bucket, and lay out memory. `root`: the cache directory.

    `shop`: opened before, so that its processes are ready by now; None: opened here. `early` is called before anything
    is timed, with the weights whose layout nothing can change.
    """
    check_pins(pins)
    if shop is None and device.kind != "cpu":
        with open_shop(device, root) as own:
            return plan_engine(draft, device, root, pins, progress, own, early)
    versions = software(device)
    cache = TimingCache.of(root, device, versions)
    counts: dict[str, int] = {}

    def report(stage: str) -> None:
        counts[stage] = counts.get(stage, 0) + 1
        progress(stage, counts[stage], 0)

    timer, compiler = (shop.time, shop) if shop else (time_cpu, NoCompiler())
    selector = Selector(draft.profile, device, timer, compiler, cache, pins, report)
    if early is not None:
        early(_settled(draft, selector))
    with ThreadPoolExecutor(1) as aside:  # the device measures its rates while kernels compile
        roof = aside.submit(shop.roof, draft.format) if shop else None
        try:
            selection = selector.run(draft.every)
        finally:
            cache.save()
    selector.used.clear()  # of what was only tried
    programs = {name: _program(name, phases, draft.profile, selector) for name, phases in draft.programs.items()}
    selector.compile_rest()
    buffers, arena = _memory(programs) if shop else ({}, 0)
    _check_compiled(programs, compiler)
    weights = _laid_out(draft, selector)
    folder = kernel_folder(root, device, versions)
    facts = _kernel_facts(programs, folder)
    engine = Engine(
        draft.spec, draft.profile, draft.format, device, versions, draft.source, programs, weights,
        buffers, arena, facts, draft.tokens, draft.work, draft.report, roof=roof.result() if roof else {},
        plugins=plugins.record((*draft.parts(), *_chosen(programs, selector, weights))),
    )  # fmt: skip
    return Planned(engine, rows_to_json(selection), folder, shop.seconds if shop else {})


def _chosen(programs: Programs, selector: Selector, weights: Mapping[str, Weight]) -> Iterator[plugins.Part]:
    """What selection put in: tactics, the calls of their plans, layouts."""
    yield from (("tactic", key) for key in selector.used)
    yield from (("call", x.name) for plan in _every(programs) for x in plan.launches if isinstance(x, Call))
    yield from (("layout", weight.layout) for weight in weights.values())


def kernel_folder(root: Path, device: Device, versions: Mapping[str, str]) -> Path:
    """Where compiled kernels are kept, by target and compilers: another version makes other binaries."""
    compilers = (f"{name}-{versions.get(name, 'absent')}" for name in COMPILES_ONLY)
    return root / "kernels" / "-".join((f"sm{device.capability}", *compilers))


def _check_compiled(programs: Programs, compiler: Compiler) -> None:
    """Kernels that only a bucket between the tuned ones needs. Raises BuildError where one does not compile."""
    if failed := compiler.refusals(_kernel_keys(programs)):
        raise BuildError(f"{len(failed)} kernels of buckets between the tuned ones do not compile: {failed}")


def _program(name: str, graphs: Mapping[str, Graph], profile: Profile, selector: Selector) -> Program:
    padded = profile.buckets() if name == DECODE else profile.encoder_buckets()
    buckets = padded if selector.device.kind == "cuda" else profile.unpadded
    phases = {name: Phase(graph, _plans(graph, selector, buckets)) for name, graph in graphs.items()}
    program = Program(phases, buckets)
    check_prepared(program, selector.kernels)
    return program


def _plans(graph: Graph, selector: Selector, buckets: Mapping[str, Sizes]) -> dict[str, dict[str, Plan]]:
    sites = {(s := Site.of(node)).key: s for node in graph.nodes if not node.is_leaf}
    return {key: {b: selector.plan(site, sizes) for b, sizes in buckets.items()} for key, site in sites.items()}


def _memory(programs: Programs) -> tuple[dict[str, Offsets], int]:
    """Of every bucket; no two programs have one of the same name."""
    planned: dict[str, tuple[Offsets, int]] = {}
    for program in programs.values():
        lifetimes = Lifetimes.of(program.phases)
        planned |= {b: plan_memory(program.phases, sizes, b, lifetimes) for b, sizes in program.buckets.items()}
    return {b: offsets for b, (offsets, _) in planned.items()}, max(top for _, top in planned.values())


def _laid_out(draft: Unplanned, selector: Selector) -> dict[str, Weight]:
    """Each weight with the layout that its readers were chosen with."""
    layouts, types = dict[str, str](), dict[str, Type]()
    for name, type, site, index in _readers(draft):
        types[name] = type
        layouts[name] = selector.result.layouts[site.key].get(index, PLAIN)
    return {name: Weight(types[name], layouts[name], expr) for name, expr in draft.weights.items()}


def _settled(draft: Unplanned, selector: Selector) -> dict[str, Weight]:
    """The weights that every reader takes plain, whatever is chosen."""
    plain: dict[str, bool] = {}
    types, open_to = dict[str, Type](), set[str]()
    for name, type, site, _ in _readers(draft):
        types[name] = type
        if site.key not in plain:
            plain[site.key] = selector.always_plain(site)
        if not plain[site.key]:
            open_to.add(name)
    return {name: Weight(types[name], PLAIN, e) for name, e in draft.weights.items() if name not in open_to}


def _readers(draft: Unplanned) -> Iterator[tuple[str, Type, Site, int]]:
    """A weight's name and type, and a site that reads it as the input of that index."""
    for graph in draft.every:
        for node in graph.nodes:
            for index, value in enumerate(node.inputs):
                if value.node.op == "weight":
                    yield value.node.name, value.type, Site.of(node), index


def _kernel_facts(programs: Programs, folder: Path) -> dict[str, Any]:
    binaries = {key: stored(folder, key) for key in sorted(_kernel_keys(programs))}
    return {key: binary.facts() for key, binary in binaries.items() if binary is not None}


def _kernel_keys(programs: Programs) -> set[str]:
    """The kernels that some plan launches."""
    return {launch.kernel for plan in _every(programs) for launch in plan.launches if isinstance(launch, KernelLaunch)}


def _every(programs: Programs) -> Iterator[Plan]:
    for phase in (phase for program in programs.values() for phase in program.phases.values()):
        yield from (plan for by_bucket in phase.plans.values() for plan in by_bucket.values())
