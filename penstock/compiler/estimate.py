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
    return tuple(c for c, refused in judged(drafted, site, sizes, device) if not refused)


def judged(drafted: Sequence[tuple[T, Draft]], site: Site, sizes: Sizes, device: Device) -> tuple[tuple[T, str], ...]:
    """Each with why it is hopeless, by both estimates, or nothing."""
    estimates = [estimate(site, sizes, device, draft) for _, draft in drafted]
    best = min((e for e in estimates if e is not None), default=0.0)
    if None in estimates:
        best = min(best, LIBRARY * least(site, sizes))
    return tuple((c, _behind(e, best)) for (c, _), e in zip(drafted, estimates, strict=True))


def _behind(own: float | None, best: float) -> str:
    if own is None or own <= HOPELESS * best:
        return ""
    return f"not tried: an estimated {own:.1f} us, the best an estimated {best:.1f} us"


def least(site: Site, sizes: Sizes) -> float:
    """Microseconds below which the site cannot run, at the model's rates."""
    needed = cost(site.op, site.inputs, site.outputs, site.attrs, sizes)
    return max(needed.bytes / READ, needed.flops / MATRIX) + LAUNCH


def estimate(site: Site, sizes: Sizes, device: Device, draft: Draft) -> float | None:
    """Microseconds; None where the first launch does not say how it tiles a product.

    Of several products, which run one after another, each reads its share of the op's bytes: that of its weights. A
    launch behind the first that says nothing, as one that adds up parts, counts as a launch.
    """
    uses = [step for step in draft.steps if isinstance(step, KernelUse)]
    products = [(use, tiles) for use in uses if (tiles := _tiles(use))]
    if not products or products[0][0] is not uses[0] or len(uses) != len(draft.steps):
        return None
    read = cost(site.op, site.inputs, site.outputs, site.attrs, sizes).bytes / READ
    weights = sum(tiles["N"] * tiles["K"] for _, tiles in products)
    total = 0.0
    for use, tiles in products:
        programs, processors = prod(use.grid), max(1, device.multiprocessors)
        operations = _operations(site, sizes, tiles) * cdiv(programs, processors) * processors / programs  # whole waves
        own = read * tiles["N"] * tiles["K"] / weights
        total += max(own * max(1.0, processors / programs), operations)
    return total + LAUNCH * len(uses)


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
