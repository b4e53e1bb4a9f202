"""Benchmarks: latency, throughput, scaling, kernels and peers, each figure beside the roof measured in the same run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.bench.classic import LatencyBenchmark

__all__ = ["LatencyBenchmark"]


def __getattr__(name: str) -> Any:
    """`LatencyBenchmark` is imported when it is asked for: what only needs the workload loads no runtime."""
    if name != "LatencyBenchmark":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from penstock.bench.classic import LatencyBenchmark

    return LatencyBenchmark
