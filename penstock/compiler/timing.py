"""Timing one plan, and checking its numbers first. Used in-process on a CPU and by worker processes on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.engine.device import Device
from penstock.engine.program import Plan, Site, Sizes
from penstock.formats.tolerance import tolerance
from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.ir.op import get
from penstock.ir.ops.examples import example_blocks
from penstock.kernels.driver import Kernel
from penstock.kernels.launch import Eager, bind

REPEATS = 9
SEED = 20


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured: microseconds (median, and half the spread between the quartiles), or why nothing was."""

    median_us: float = 0.0
    spread_us: float = 0.0
    refused: str = ""

    @property
    def ok(self) -> bool:
        return not self.refused


def example_sizes(sizes: Sizes) -> dict[str, int]:
    """Bucket sizes, and a pool for examples that need one."""
    return {"N": example_blocks(sizes), **sizes}


def example_inputs(site: Site, sizes: Sizes, device: str) -> list[Any]:
    """Realistic inputs, the same for the same site and sizes."""
    example = get(site.op).example
    assert example is not None, f"op {site.op} has no example"
    generator = torch.Generator(device=device).manual_seed(SEED)
    return list(example(site.inputs, dict(site.attrs), example_sizes(sizes), generator, device))


def expected(site: Site, inputs: Sequence[Any], sizes: Sizes) -> tuple[Any, ...]:
    """The reference's results on copies of the inputs, so that state stays as it was."""
    from penstock.ir.interpret import run_node

    node = _node(site)
    with torch.no_grad():
        return run_node(node, [x.clone() for x in inputs], sizes)


def _node(site: Site) -> Any:
    from penstock.ir.graph import Node, leaf

    leaves = tuple(leaf("input", str(i), t) for i, t in enumerate(site.inputs))
    return Node(site.op, leaves, site.attrs, site.outputs)


def gate(site: Site, results: Sequence[Any], wanted: Sequence[Any]) -> str:
    """Empty where every result is within its format's tolerance, row by row; otherwise what is off, and by how much."""
    for index, (type, got, want) in enumerate(zip(site.outputs, results, wanted, strict=True)):
        limit = tolerance(type.format).relative
        error = row_error(got, want)
        if not error <= limit:
            return f"result {index} is off by {error:.3g} of its row's largest number, {limit:.3g} is allowed"
    return ""


def row_error(got: Any, want: Any) -> float:
    """max over rows of max|got - want| / max|want|; a row is the last dimension. NaN counts as infinite."""
    if got.numel() == 0:
        return 0.0
    difference = (got.double() - want.double()).abs().amax(-1)
    scale = want.double().abs().amax(-1)
    error = torch.where(difference == 0, 0.0, difference / scale.clamp_min(1e-30)).max()
    return float(torch.nan_to_num(error, nan=torch.inf))


def time_cpu(site: Site, sizes: Sizes, plan: Plan) -> Timing:
    """Run the plan as the CPU backend does."""
    inputs = example_inputs(site, sizes, "cpu")
    run = Eager(site.op, plan, len(inputs), len(site.outputs))
    with torch.no_grad():
        if refused := gate(site, run([x.clone() for x in inputs], sizes), expected(site, inputs, sizes)):
            return Timing(refused=refused)
        return summary([_seconds(lambda: run(inputs, sizes)) for _ in range(REPEATS)])


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def summary(seconds: Sequence[float], runs: int = 1) -> Timing:
    """Median and half the inter-quartile range, in microseconds a run."""
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / 2
    return Timing(statistics.median(ordered) * 1e6 / runs, spread * 1e6 / runs)


class CudaTimer:
    """Times plans on the current GPU under graph capture, over more weight copies than the L2 holds."""

    def __init__(self, device: Device, kernels: Callable[[str], Kernel]) -> None:
        self.device, self.kernels = device, kernels
        self._case: tuple[str, Any] = ("", None)  # the inputs and reference of the last site and sizes

    def __call__(self, site: Site, sizes: Sizes, plan: Plan) -> Timing:
        inputs, wanted = self._example(site, sizes)
        kernels = _Kernels(self.kernels)
        copies = self._copies(site, inputs)
        runs = [self._bound(site, sizes, plan, x, kernels) for x in copies]
        outputs, steps = runs[0]
        self._poison(outputs)
        for step in steps:
            step()
        torch.cuda.synchronize()
        if refused := gate(site, outputs, wanted):
            return Timing(refused=refused)
        return self._replay([step for _, bound in runs for step in bound], len(runs))

    def _example(self, site: Site, sizes: Sizes) -> tuple[list[Any], tuple[Any, ...]]:
        key = f"{site.key}{dict(sizes)}"
        if self._case[0] != key:
            self._case = ("", None)
            inputs = example_inputs(site, sizes, "cuda")
            self._case = (key, (inputs, expected(site, inputs, sizes)))
        inputs, wanted = self._case[1]
        return inputs, wanted

    def _copies(self, site: Site, inputs: list[Any]) -> list[list[Any]]:
        """Fresh state, and so many copies of the weights that none is still in the L2 when its turn comes again."""
        weights = sum(inputs[i].nbytes for i in site.weights)
        count = min(32, max(1, -(-2 * self.device.l2_bytes // weights))) if weights else 1
        state = set(get(site.op).writes or ())
        fresh = [inputs[i].clone() if i in state else x for i, x in enumerate(inputs)]
        return [fresh] + [
            [x.clone() if i in site.weights else x for i, x in enumerate(fresh)] for _ in range(count - 1)
        ]

    def _bound(self, site: Site, sizes: Sizes, plan: Plan, inputs: list[Any], kernels: Mapping[str, Kernel]) -> Any:
        outputs = [self._output(site, index, type, inputs, sizes) for index, type in enumerate(site.outputs)]
        workspace = torch.empty(plan.workspace + 256, dtype=torch.uint8, device="cuda")
        return outputs, bind(plan, inputs, outputs, workspace, kernels, sizes)

    def _output(self, site: Site, index: int, type: Type, inputs: list[Any], sizes: Sizes) -> Any:
        for source, out in (get(site.op).writes or {}).items():
            if out == index:
                return inputs[source]
        dtype = getattr(torch, type.format.torch_dtype)
        return torch.empty(type.concrete(example_sizes(sizes)), dtype=dtype, device="cuda")

    def _poison(self, outputs: list[Any]) -> None:
        for out in outputs:
            if out.is_floating_point() and out.dim() < 5:  # not the state, which outputs may alias
                out.fill_(float("nan"))

    def _replay(self, steps: list[Callable[[], None]], runs: int) -> Timing:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for step in steps:
                step()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        seconds = []
        for _ in range(REPEATS + 2):
            marks[0].record()
            graph.replay()
            marks[1].record()
            marks[1].synchronize()
            seconds.append(marks[0].elapsed_time(marks[1]) / 1e3)
        return summary(seconds[2:], runs)


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
