"""When each node of a step runs: from CUPTI's records of graph replays, from events around eager launches, or by the
host's clock on a CPU."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.engine.program import Call, KernelLaunch
from penstock.ir.graph import Node
from penstock.ir.lazy import torch
from penstock.runtime.batch import Standing
from penstock.runtime.step import CpuBackend

if TYPE_CHECKING:
    from penstock.runtime.cuda import CudaBackend
    from penstock.runtime.graphs import Bound, BoundNode

WARM_UP, STEPS = 3, 15
BUSY = 400_000  # cycles that the device is kept busy for, until the host has launched a replay
BUSY_LONG = 40_000_000  # or every node of a step, one by one
ACTIVITIES = ("kernel", "gpu_memcpy", "gpu_memset")
UP, DOWN = "HtoD", "DtoH"  # in the names of the copies that begin and end a step


@dataclass(frozen=True, slots=True)
class Span:
    """One launch of a step, in microseconds from the step's first start."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class NodeSpan:
    """A node in a step, in microseconds. `busy`: from the end of what ran before (or its own start, if later) to its
    end, gaps within left out; `gap`: in which nothing ran, before and within; `overlap`: it had started so long before
    the node before it ended, which programmatic launches do.
    """

    phase: str
    node: Node
    launches: int
    start: float
    end: float
    busy: float
    gap: float
    overlap: float


@dataclass(frozen=True)
class Trace:
    """`step_us`: the median step with nobody looking. `how`: who timed the nodes; `why`: why nobody better did."""

    nodes: tuple[NodeSpan, ...]
    step_us: float
    how: str
    why: str = ""


def trace(standing: Standing) -> Trace:
    """Time the nodes of a standing step."""
    for _ in range(WARM_UP):
        standing.run()
    if isinstance(standing.backend, CpuBackend):
        return _trace_cpu(standing)
    backend: Any = standing.backend
    return _trace_cuda(standing, backend)


def node_spans(nodes: Sequence[tuple[str, Node]], counts: Sequence[int], spans: Sequence[Span]) -> list[NodeSpan]:
    """The launches of a step, in the order they ran, handed out to its nodes: so many to each."""
    found, left, end = [], iter(spans), 0.0
    for (phase, node), count in zip(nodes, counts, strict=True):
        busy = gap = overlap = 0.0
        mine = [next(left) for _ in range(count)]
        for index, span in enumerate(mine):
            gap += max(0.0, span.start - end)
            overlap += max(0.0, end - span.start) if index == 0 else 0.0
            busy += max(0.0, span.end - max(span.start, end))
            end = max(end, span.end)
        start = mine[0].start if mine else end
        found.append(NodeSpan(phase, node, count, start, end, busy, gap, overlap))
    return found


def median_spans(steps: Sequence[Sequence[Span]]) -> list[Span]:
    """Of each launch its median start and end over the steps."""
    return [
        Span(each[0].name, statistics.median(s.start for s in each), statistics.median(s.end for s in each))
        for each in zip(*steps, strict=True)
    ]


# --- on a CPU -------------------------------------------------------------------------------------------------------


def _trace_cpu(standing: Standing) -> Trace:
    """The visitor is called between nodes: from one call to the next is one node's time."""
    whole, steps = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        standing.run()
        whole.append((time.perf_counter() - start) * 1e6)
    clock = _Clock()
    standing.backend.visit = clock
    for _ in range(STEPS):
        steps.append(clock.step(standing.run))
    standing.backend.visit = None
    spans = node_spans(clock.nodes, [1] * len(clock.nodes), median_spans(steps))
    return Trace(tuple(spans), statistics.median(whole), "the host's clock, node by node")


class _Clock:
    """A visitor that notes the time."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, Node]] = []
        self._marks: list[float] = []

    def __call__(self, phase: str, node: Node, outputs: Sequence[Any], sizes: Mapping[str, int]) -> None:
        self._marks.append(time.perf_counter())
        self.nodes.append((phase, node))

    def step(self, run: Callable[[], object]) -> list[Span]:
        self.nodes, self._marks = [], [time.perf_counter()]
        run()
        times = [(mark - self._marks[0]) * 1e6 for mark in self._marks]
        return [Span(n.op, times[i], times[i + 1]) for i, (_, n) in enumerate(self.nodes)]


# --- on a GPU -------------------------------------------------------------------------------------------------------


def _trace_cuda(standing: Standing, backend: CudaBackend) -> Trace:
    sizes = standing.batch.sizes
    bound, captured = backend.graphs.exact(sizes["T"], sizes["S"], sizes["L"])
    whole = _unwatched(standing, captured.graph)
    nodes = [(each.phase, each.node) for each in bound.nodes]
    try:
        counts = Counter(backend).counts(bound)
        steps = _recorded(standing, _names(backend, bound), sum(counts))
    except Unrecorded as error:
        spans = _between_events(standing, bound)
        return Trace(
            tuple(node_spans(nodes, [1] * len(nodes), spans)), whole, "events around eager launches", str(error)
        )
    return Trace(tuple(node_spans(nodes, counts, median_spans(steps))), whole, "CUPTI, in graph replays")


class Unrecorded(Exception):
    """The profiler did not record the step launch by launch; its message says why."""


def _unwatched(standing: Standing, graph: Any) -> float:
    """Microseconds of a replay, by events around it while the device is busy before."""
    times = []
    for _ in range(STEPS):
        standing.run()  # sets the lengths back, which the replays below move on by one step
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(BUSY)
        marks[0].record()
        graph.replay()
        marks[1].record()
        marks[1].synchronize()
        times.append(1e3 * float(marks[0].elapsed_time(marks[1])))
    return statistics.median(times)


def _names(backend: CudaBackend, bound: Bound) -> list[str]:
    """The functions that the step's own kernels are called by, "" for a call's."""
    launches = (launch for each in bound.nodes for launch in each.plan.launches)
    kernels = backend.engine.kernels
    return [str(kernels[x.kernel]["entry"]) if isinstance(x, KernelLaunch) else "" for x in launches]


class Counter:
    """How many activities each node is on the device: a kernel is one, a library's call is captured and counted."""

    def __init__(self, backend: CudaBackend) -> None:
        self._stream = backend.graphs.stream
        self._known: dict[tuple[Call, str], int] = {}

    def counts(self, bound: Bound) -> list[int]:
        return [sum(self._of(each, i) for i in range(len(each.steps))) for each in bound.nodes]

    def _of(self, each: BoundNode, index: int) -> int:
        launch = each.plan.launches[index]
        if isinstance(launch, KernelLaunch):
            return 1
        key = (launch, str([tuple(out.shape) for out in each.outputs]))
        if key not in self._known:
            self._known[key] = _activities(each.steps[index], self._stream)
        return self._known[key]


def _activities(step: Callable[[], None], stream: Any) -> int:
    """Kernels, copies and fills of one launch."""
    from cuda.bindings import driver

    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.no_grad(), torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        step()
        graph.capture_end()
    raw = driver.CUgraph(graph.raw_cuda_graph())
    error, _, count = driver.cuGraphGetNodes(raw, 0)[:3]
    if int(error):
        raise Unrecorded(f"the driver does not say what a call launches ({error!r})")
    return int(count)


def _recorded(standing: Standing, names: Sequence[str], count: int) -> list[list[Span]]:
    """The launches of each of several replays. Raises Unrecorded where they are not those of the step."""
    backend: Any = standing.backend
    activities = [torch.profiler.ProfilerActivity.CUDA]
    backend.annotate = True
    with torch.profiler.profile(activities=activities, acc_events=True):  # CUPTI starts up, which takes its time
        standing.run()
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(STEPS):
            standing.run()
    backend.annotate = False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    steps = list(split(events))
    if len(steps) != STEPS:
        raise Unrecorded(f"the profiler recorded {len(steps)} of {STEPS} steps")
    for step in steps:
        if len(step) != count:
            raise Unrecorded(f"the profiler recorded {len(step)} launches of a step of {count}")
    own = [name for name in names if name]
    found = [s.name for s in steps[0] if s.name in set(own)]
    if found != own:
        raise Unrecorded("the kernels that the profiler recorded are not those of the step, in its order")
    return steps[1:]  # the first is colder


def split(events: Sequence[Mapping[str, Any]]) -> Iterator[list[Span]]:
    """The steps in a chrome trace: the device's activities before each copy back, behind the upload if there is one."""
    ours = sorted((e for e in events if e.get("ph") == "X" and e.get("cat") in ACTIVITIES), key=lambda e: e["ts"])
    step: list[Span] = []
    first = 0.0
    for event in ours:
        if UP in event["name"]:
            step = []
        elif DOWN in event["name"]:
            yield step
            step = []
        else:
            first = event["ts"] if not step else first
            step.append(Span(event["name"], event["ts"] - first, event["ts"] - first + event["dur"]))


def _between_events(standing: Standing, bound: Bound) -> list[Span]:
    """Each node's time by events between eager launches: how they overlap or wait for each other is not seen."""
    steps = []
    for _ in range(STEPS):
        standing.run()  # leaves its upload behind, which sets the lengths back again
        torch.cuda._sleep(BUSY_LONG)
        marks = [_mark()]
        with torch.no_grad():
            for each in bound.nodes:
                each.run()
                marks.append(_mark())
        marks[-1].synchronize()
        times = [1e3 * float(marks[0].elapsed_time(mark)) for mark in marks]
        steps.append([Span(each.node.op, times[i], times[i + 1]) for i, each in enumerate(bound.nodes)])
    return median_spans(steps)


def _mark() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
