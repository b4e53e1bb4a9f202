"""Timing one plan, and checking its numbers. Used in-process on a CPU and by worker processes on a GPU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from penstock.engine.device import Device
from penstock.engine.program import Plan, Site, Sizes
from penstock.formats.tolerance import tolerance
from penstock.ir.lazy import torch
from penstock.ir.op import get
from penstock.ir.ops.examples import example, example_blocks
from penstock.kernels.driver import Kernel
from penstock.kernels.launch import Eager, bind
from penstock.kernels.layouts import pack
from penstock.kernels.roof import device_seconds, host_seconds

METHOD = 4  # of measuring; times that another one took are not compared with
REPEATS, WARM_UP = 9, 2
FEW = 3  # repeats after which a plan that is far behind the best is left alone, and all that a long replay needs
BEHIND = 1.25  # times the best
LONG_REPLAY = 3e-3  # seconds
SEED = 20
Layouts = tuple[tuple[int, str], ...]  # of weights, by the index of the input
LEAST, MOST = 8, 16  # launches in a timed graph
LONG, ENOUGH = 0.5e-3, 2  # seconds of a launch from which a graph of so many launches is timed as well as one of LEAST
SPACE = 2 << 30  # bytes that copies of inputs may take, and again those of results and workspaces
SLICE = 1 << 25  # numbers compared at once: in float32 they take four bytes each, and a few times that in all
NAN_BYTE, ODD_BYTE = 0xFF, 0x5A  # every float format reads a run of the first as NaN


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured: microseconds (median, and half the spread between the quartiles), or why nothing was."""

    median_us: float = 0.0
    spread_us: float = 0.0
    refused: str = ""

    @property
    def ok(self) -> bool:
        return not self.refused


def example_sizes(site: Site, sizes: Sizes) -> dict[str, int]:
    """Bucket sizes, and a pool for examples that need one."""
    return {"N": example_blocks(site.inputs, sizes), **sizes}


def example_inputs(site: Site, sizes: Sizes, device: str) -> list[Any]:
    """Realistic inputs, the same for the same site and sizes."""
    sample = get(site.op).example or example  # a plugin's op may leave it to us
    generator = torch.Generator(device=device).manual_seed(SEED)
    return list(sample(site.inputs, dict(site.attrs), example_sizes(site, sizes), generator, device))


def fresh(site: Site, inputs: Sequence[Any]) -> list[Any]:
    """The inputs, with copies of those that the op replaces: running it leaves the originals as they were."""
    written = get(site.op).writes or {}
    return [x.clone() if i in written else x for i, x in enumerate(inputs)]


def expected(site: Site, inputs: Sequence[Any], sizes: Sizes) -> tuple[Any, ...]:
    """The reference's results; the inputs stay as they were."""
    from penstock.ir.interpret import run_node

    node = _node(site)
    with torch.no_grad():
        return run_node(node, fresh(site, inputs), sizes)


def _node(site: Site) -> Any:
    from penstock.ir.graph import Node, leaf

    leaves = tuple(leaf("input", str(i), t) for i, t in enumerate(site.inputs))
    return Node(site.op, leaves, site.attrs, site.outputs)


def stored(inputs: Sequence[Any], layouts: Layouts) -> list[Any]:
    """The inputs as a plan finds them: weights packed as it reads them."""
    names = dict(layouts)
    return [pack(names[i], x).contiguous().reshape(x.shape) if i in names else x for i, x in enumerate(inputs)]


def gate(site: Site, results: Sequence[Any], wanted: Sequence[Any]) -> str:
    """Empty where every result is within its format's tolerance, row by row; otherwise what is off, and by how much."""
    for index, (type, got, want) in enumerate(zip(site.outputs, results, wanted, strict=True)):
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"result {index} is {got.dtype}{list(got.shape)}, not {want.dtype}{list(want.shape)}"
        limit = tolerance(type.format).relative
        error = row_error(got, want)
        if not error <= limit:
            return f"result {index} is off by {error:.3g} of its row's largest number, {limit:.3g} is allowed"
    return ""


def row_error(got: Any, want: Any) -> float:
    """max over rows of max|got - want| / max|want|; a row is the last dimension. NaN counts as infinite."""
    if got.numel() == 0:
        return 0.0
    width = max(1, got.shape[-1])
    pairs = zip(*(x.reshape(-1, width).split(max(1, SLICE // width)) for x in (got, want)), strict=True)
    return float(torch.stack([_error(_exact(a), _exact(b)) for a, b in pairs]).max())


def _exact(x: Any) -> Any:
    """In a format in which differences of near numbers are exact: float32 for its own and narrower floats."""
    return x.float() if x.is_floating_point() and x.element_size() <= 4 else x.double()


def _error(got: Any, want: Any) -> Any:
    difference = torch.where(got == want, 0.0, got - want).abs().amax(-1)  # infinities that agree are no difference,
    scale = want.abs().masked_fill(want.isinf(), 0.0).amax(-1).clamp_min(1e-30)  # nor a scale for any
    error = torch.where(difference == 0, 0.0, difference / scale).max()
    return torch.nan_to_num(error.double(), nan=torch.inf)


def time_cpu(site: Site, sizes: Sizes, plan: Plan, best_us: float = math.inf, layouts: Layouts = ()) -> Timing:
    """Run the plan as the CPU backend does, each time on the same state, however far behind the best it is."""
    inputs = example_inputs(site, sizes, "cpu")
    run = Eager(site.op, plan, len(inputs), len(site.outputs))
    with torch.no_grad():
        packed = stored(inputs, layouts)
        if refused := gate(site, run(fresh(site, packed), sizes), expected(site, inputs, sizes)):
            return Timing(refused=refused)
        return summary([host_seconds(partial(run, fresh(site, packed), sizes)) for _ in range(REPEATS)])


def summary(seconds: Sequence[float], runs: int = 1) -> Timing:
    """Median and half the inter-quartile range, in microseconds a run."""
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / 2
    return Timing(statistics.median(ordered) * 1e6 / runs, spread * 1e6 / runs)


class CudaTimer:
    """Times plans on the current GPU: several launches in a graph, so that the graph's own start hardly counts.

    Before each replay the L2 is filled with something else, and within one replay weights and state are read from
    another copy by each launch, so that they come from memory as in a step. What goes from op to op stays in the L2, as
    in a step. The numbers are checked twice: of one eager run, and of a replay, in which launches may overlap.
    """

    def __init__(self, device: Device, kernels: Callable[[str], Kernel]) -> None:
        self.device, self.kernels = device, kernels
        self._last: tuple[str, _Case | None] = ("", None)  # candidates of one site and bucket follow one another
        words = max(8 * device.l2_bytes, 1 << 20) // 4  # about 0.1 ms to read on an H200
        self._stream = torch.zeros(words, dtype=torch.int32, device=device.kind)

    def __call__(
        self, site: Site, sizes: Sizes, plan: Plan, best_us: float = math.inf, layouts: Layouts = ()
    ) -> Timing:
        """`best_us`: of the plans timed before for the same site and sizes. One far behind it is repeated less.
        `layouts`: of the weights that are not plain."""
        case = self._case(site, sizes, layouts)
        kernels = _Kernels(self.kernels)
        zeroed = torch.zeros(plan.zeroed, dtype=torch.uint8, device=case.device)  # shared by all, as in a step
        first = _Run(case, 0, plan, kernels, zeroed)
        case.restore()
        first.poison()
        launch = device_seconds(first)
        if refused := gate(site, first.outputs, case.wanted) or first.unclean():
            return Timing(refused=refused)
        passed = [y.clone() for y in first.outputs]
        count = ENOUGH if launch > LONG else case.launches
        distinct = min(count, max(1, SPACE // first.nbytes))  # as far as there is room
        # A sample of single tokens is timed as steps of them run; the numbers above are those of the whole plan.
        timed = plan.for_singles if sizes.get("T") == sizes.get("S") else plan
        runs = [_Run(case, i, timed, kernels, zeroed) for i in range(distinct)]
        graph = captured([runs[i % distinct] for i in range(count)])
        timing = self._repeated(graph, case, count, best_us)
        if get(site.op).writes and min(distinct, len(case.copies)) < count:
            return timing  # some state was replaced more than once
        return Timing(refused=refused) if (refused := self._overlap(graph, case, runs, passed)) else timing

    def _repeated(self, graph: Any, case: _Case, count: int, best_us: float) -> Timing:
        """The time of a launch, by as many replays as it takes to tell which of two close ones is faster."""
        warm = [self._replay(graph, case)]
        if warm[0] < LONG_REPLAY:
            warm += [self._replay(graph, case) for _ in range(WARM_UP - 1)]
        seconds = [self._replay(graph, case) for _ in range(FEW)]
        near = summary(seconds, count).median_us <= BEHIND * best_us
        if near and warm[0] < LONG_REPLAY:
            seconds += [self._replay(graph, case) for _ in range(REPEATS - FEW)]
        return summary(seconds, count)

    def _case(self, site: Site, sizes: Sizes, layouts: Layouts = ()) -> _Case:
        key = f"{site.key}{dict(sizes)}{layouts}"
        if self._last[0] != key:
            self._last = ("", None)  # frees what it held before the next is made
            self._last = (key, _Case(site, sizes, self.device, layouts))
        assert self._last[1] is not None
        return self._last[1]

    def _replay(self, graph: Any, case: _Case) -> float:
        """Seconds of one replay on fresh state."""
        case.restore()
        # Empties the L2, and keeps the device busy until the host has launched the graph behind it.
        self._stream.sum(dtype=torch.int32)
        return device_seconds(graph.replay)

    def _overlap(self, graph: Any, case: _Case, runs: Sequence[_Run], passed: Sequence[Any]) -> str:
        """What is off after a replay into poisoned memory: a kernel that does not wait for what it reads.

        `passed`: results that passed the gate; what equals them to the bit passes as well.
        """
        case.restore()
        for run in runs:
            run.poison()
        graph.replay()
        _wait()
        off = (run for run in runs if not _equal(run.outputs, passed))
        faults = (gate(case.site, run.outputs, case.wanted) for run in off)
        fault = next(filter(None, faults), "") or runs[0].unclean()
        return f"in a replay {fault}" if fault else ""


def _equal(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """To the bit: torch compares not all formats."""
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True))


class _Case:
    """One site in one bucket: its inputs, what the reference makes of them, and copies for launches to take in turn."""

    def __init__(self, site: Site, sizes: Sizes, device: Device, layouts: Layouts = ()) -> None:
        self.site, self.sizes, self.device = site, sizes, device.kind
        self.inputs = example_inputs(site, sizes, device.kind)
        self.wanted = expected(site, self.inputs, sizes)
        self.inputs = stored(self.inputs, layouts)
        # State is what the op replaces, and pools of blocks that it only reads.
        pools = {i for i, t in enumerate(site.inputs) if "N" in t.symbols}
        self.rotated = {*site.weights, *(get(site.op).writes or ()), *pools}
        size = sum(self.inputs[i].nbytes for i in self.rotated)
        self.launches = min(MOST, max(LEAST, -(-2 * device.l2_bytes // size))) if size else MOST
        count = min(self.launches, max(1, SPACE // size)) if size else 1
        self.copies = [fresh(site, self.inputs), *(self._copy() for _ in range(1, count))]

    def _copy(self) -> list[Any]:
        return [x.clone() if i in self.rotated else x for i, x in enumerate(self.inputs)]

    def restore(self) -> None:
        """State as the example has it, in every copy."""
        for copy in self.copies:
            for i in get(self.site.op).writes or ():
                copy[i].copy_(self.inputs[i])

    def output(self, index: int, inputs: Sequence[Any]) -> Any:
        """Memory for a result: the input that it replaces, or its own."""
        for source, out in (get(self.site.op).writes or {}).items():
            if out == index:
                return inputs[source]
        type = self.site.outputs[index]
        shape = type.concrete(example_sizes(self.site, self.sizes))
        return torch.empty(shape, dtype=getattr(torch, type.format.torch_dtype), device=self.device)


class _Run:
    """A plan bound to one copy of the inputs, to results and to a workspace."""

    def __init__(self, case: _Case, index: int, plan: Plan, kernels: Mapping[str, Kernel], zeroed: Any) -> None:
        inputs = case.copies[index % len(case.copies)]
        self.outputs = [case.output(i, inputs) for i in range(len(case.site.outputs))]
        replaced = set((get(case.site.op).writes or {}).values())
        self._own = [y for i, y in enumerate(self.outputs) if i not in replaced]
        self._workspace = torch.empty(plan.workspace + 256, dtype=torch.uint8, device=case.device)
        self._zeroed = zeroed
        self._steps = bind(plan, inputs, self.outputs, self._workspace, zeroed, kernels, case.sizes)

    @property
    def nbytes(self) -> int:
        """Memory of this run alone."""
        return sum(x.nbytes for x in (self._workspace, *self._own))

    def poison(self) -> None:
        """Leave nothing that could pass for a result: NaN, or an integer that nothing comes to."""
        self._workspace.fill_(NAN_BYTE)
        for out in self._own:
            out.view(torch.uint8).fill_(NAN_BYTE if out.is_floating_point() else ODD_BYTE)

    def unclean(self) -> str:
        """Empty where the memory that must be left zero is; otherwise how much of it is not."""
        left = int(self._zeroed.count_nonzero()) if self._zeroed.numel() else 0
        return f"leaves {left} of its {self._zeroed.numel()} zeroed bytes other than zero" if left else ""

    def __call__(self) -> None:
        for step in self._steps:
            step()


def captured(runs: Sequence[Callable[[], None]]) -> Any:
    """A CUDA graph of the runs, one after another. Capturing runs nothing.

    Not by torch.cuda.graph, which gives unused memory back to the driver each time, so that the next plan waits for it.
    """
    graph = torch.cuda.CUDAGraph()
    _wait()
    with torch.cuda.stream(_capture_stream()):
        graph.capture_begin()
        try:
            for run in runs:
                run()
        finally:
            graph.capture_end()
    return graph


@lru_cache(maxsize=1)
def _capture_stream() -> Any:
    return torch.cuda.Stream()


def _wait() -> None:
    torch.cuda.synchronize()


class _Kernels(Mapping[str, Kernel]):
    """Loads kernels as they are asked for."""

    def __init__(self, load: Callable[[str], Kernel]) -> None:
        self._load = load

    def __getitem__(self, key: str) -> Kernel:
        return self._load(key)

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0
