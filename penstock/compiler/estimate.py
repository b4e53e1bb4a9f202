"""A byte/FLOP model of drafted candidates, before anything is compiled: it drops the hopeless, timing chooses.

It knows what tiles show: padding, programs that leave multiprocessors idle, a last wave that is half empty, extra
launches, and whether a tile is tall enough for matrix units. It knows nothing of registers, of latency or of a
library's kernels, so its figures are only compared with each other, and generously.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TypeVar

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.ir.cost import cost
from penstock.kernels.tactic import Draft, KernelUse, cdiv

# Rates of the large GPUs that tactics are made for, a microsecond; only their ratios matter.
READ = 4.2e6  # bytes
MATRIX, PLAIN = 600e6, 30e6  # operations of matrix units, and of the cores beside them
LAUNCH = 1.5  # microseconds
MATRIX_TOKENS = 16  # tokens of the smallest tile that matrix units multiply
HOPELESS = 1.5  # times the best estimate
LIBRARY = 1.7  # times the least that the op must move and multiply: what a library's product, which says nothing, takes

T = TypeVar("T")


def promising(drafted: Sequence[tuple[T, Draft]], site: Site, sizes: Sizes, device: Device) -> tuple[T, ...]:
    """Those that are not estimated to be hopelessly behind the best; what has no estimate stays."""
    estimates = [estimate(site, sizes, device, draft) for _, draft in drafted]
    best = min((e for e in estimates if e is not None), default=0.0)
    if None in estimates:
        best = min(best, LIBRARY * least(site, sizes))
    return tuple(c for (c, _), e in zip(drafted, estimates, strict=True) if e is None or e <= HOPELESS * best)


def least(site: Site, sizes: Sizes) -> float:
    """Microseconds below which the site cannot run, at the model's rates."""
    needed = cost(site.op, site.inputs, site.outputs, site.attrs, sizes)
    return max(needed.bytes / READ, needed.flops / MATRIX) + LAUNCH


def estimate(site: Site, sizes: Sizes, device: Device, draft: Draft) -> float | None:
    """Microseconds; None where the draft does not say how it tiles a product."""
    uses = [step for step in draft.steps if isinstance(step, KernelUse)]
    tiles = _tiles(uses[0]) if uses and len(uses) == len(draft.steps) else None
    if tiles is None:
        return None
    programs, processors = prod(uses[0].grid), max(1, device.multiprocessors)
    read = cost(site.op, site.inputs, site.outputs, site.attrs, sizes).bytes / READ
    operations = _operations(site, sizes, tiles) * cdiv(programs, processors) * processors / programs  # whole waves
    return max(read * max(1.0, processors / programs), operations) + LAUNCH * len(uses)


def _tiles(use: KernelUse) -> Mapping[str, int] | None:
    """N, K, ROWS of N and TOKENS of a tile: what product kernels call them."""
    constants = dict(use.kernel.constants)
    found = {name: constants.get(name) for name in ("N", "K", "ROWS", "TOKENS")}
    numbers = {name: value for name, value in found.items() if isinstance(value, int) and value > 0}
    return numbers if len(numbers) == len(found) else None


def _operations(site: Site, sizes: Sizes, tiles: Mapping[str, int]) -> float:
    """Microseconds of the product, its tiles padded, on all processors."""
    tokens = int(site.inputs[0].concrete(sizes)[0])
    padded = cdiv(tokens, tiles["TOKENS"]) * tiles["TOKENS"] * cdiv(tiles["N"], tiles["ROWS"]) * tiles["ROWS"]
    return 2 * padded * tiles["K"] / (MATRIX if tiles["TOKENS"] >= MATRIX_TOKENS else PLAIN)
