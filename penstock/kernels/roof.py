"""The roof: the rates at which this machine at best reads memory and multiplies, measured in the run they judge.

What is assumed. Reading: one stream over a buffer far larger than the caches, nothing written; weights of a large
matrix-vector product are read that way, so a step cannot read them faster, unless the whole model fits into a cache, in
which case a figure over 100 % is possible and honest. Multiplying: one square product by the vendor's library in a
burst of milliseconds; a sustained load is slower where power or heat limits it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from penstock import formats
from penstock.engine.device import Device
from penstock.ir.lazy import torch

GPU_BUFFER = 3 << 30  # bytes: far more than any cache, and less than a build may take beside its weights
CPU_BUFFER = 256 << 20  # bytes; several times the caches of common machines
GPU_SIDE, CPU_SIDE = 8192, 1024  # rows and columns of the product
WARM_UP, REPEATS = 3, 9


@dataclass(frozen=True, slots=True)
class Roof:
    """Bytes and operations a second. A multiplication and an addition count as two operations."""

    read_bytes_per_s: float
    flops_per_s: float

    def seconds(self, read: float, operations: float) -> float:
        """The least time for so many bytes and operations, if either hides behind the other entirely."""
        return max(read / self.read_bytes_per_s, operations / self.flops_per_s)


def measure(device: Device, format: str = "bf16") -> Roof:
    """The roof of the device at hand; `format`: that of the GPU's product. A CPU multiplies in f32 whatever it says."""
    with torch.no_grad():
        return _measure_cuda(format) if device.kind == "cuda" else _measure_cpu()


def _measure_cpu() -> Roof:
    buffer = torch.ones(CPU_BUFFER // 4)
    left, right = torch.rand(CPU_SIDE, CPU_SIDE), torch.rand(CPU_SIDE, CPU_SIDE)
    read = _best(buffer.sum)
    product = _best(lambda: left @ right)
    return Roof(CPU_BUFFER / read, 2 * CPU_SIDE**3 / product)


def _measure_cuda(format: str) -> Roof:
    dtype = getattr(torch, formats.parse(format).torch_dtype)
    size = min(GPU_BUFFER, torch.cuda.mem_get_info()[0] // 2) // 4096 * 4096
    buffer = torch.randint(0, 1 << 30, (size // 4,), dtype=torch.int32, device="cuda")
    total = partial(buffer.sum, dtype=torch.int32)  # a wider sum would wait for its adders
    read = _median(total)
    del buffer, total
    left, right = (torch.randn(GPU_SIDE, GPU_SIDE, device="cuda").to(dtype) for _ in range(2))
    product = _median(lambda: left @ right)
    return Roof(size / read, 2 * GPU_SIDE**3 / product)


def _median(work: Callable[[], object]) -> float:
    return statistics.median([device_seconds(work) for _ in range(WARM_UP + REPEATS)][WARM_UP:])


def _best(work: Callable[[], object]) -> float:
    """The least time: what a CPU's other work takes away is not the machine's limit."""
    return min(host_seconds(work) for _ in range(WARM_UP + REPEATS))


def host_seconds(work: Callable[[], object]) -> float:
    """Seconds by the host's clock until the work returns."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def device_seconds(work: Callable[[], object]) -> float:
    """Seconds on the device, which is done with the work when this returns."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    marks[0].record()
    work()
    marks[1].record()
    marks[1].synchronize()
    return float(marks[0].elapsed_time(marks[1])) / 1e3
