"""A weight matrix times up to eight vectors, on the plain cores: bound by the stream of weights."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels.linear.product import (
    NO_NORM,
    Norm,
    Operands,
    Product,
    distinct,
    fitting_columns,
    operands,
    product_use,
    refusal,
)
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, cdiv, next_power_of_2

SOURCE = "penstock.kernels.linear.gemv_triton:gemv"
NAMES = ("x", "w", "bias", "squares", "residual", "gain", "y", "scaled", "shares")
MAX_TOKENS = 8
WIDE = 8192  # columns from which tall tiles win: measured on 4096x14336

# (ROWS, COLUMNS, warps, lines to prefetch), best first.
TALL = ((16, 1024, 8, 64), (16, 1024, 4, 64))
USUAL = ((4, 2048, 8, 0), (4, 2048, 8, 64), (8, 1024, 4, 64), (2, 2048, 8, 64), (4, 1024, 4, 64), (8, 2048, 8, 0))
# More rows, so that x, read once for ROWS rows, stays a small part of the traffic; fewer where registers run out.
SEVERAL = (
    (8, 1024, 4, 64),
    (4, 2048, 8, 64),
    (8, 1024, 8, 64),
    (4, 1024, 4, 64),
    (16, 512, 4, 64),
    (8, 512, 2, 64),
    (16, 1024, 8, 64),
)


class Gemv(Tactic):
    """A few whole rows of w per program, summed in float32; every weight is read once for all tokens."""

    op = "linear"
    name = "gemv"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return refusal(site, sizes, device, 1, MAX_TOKENS, same=False)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        p = Product.of(site, sizes)
        shapes = SEVERAL if p.tokens > 1 else TALL + USUAL if p.k >= WIDE else USUAL + TALL
        return distinct(
            {"ROWS": r, "COLUMNS": fitting_columns(c, p.k), "warps": warps, "PREFETCH": lines}
            for r, c, warps, lines in shapes
        )

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        p = Product.of(site, sizes)
        return Draft((gemv_use(p, device, config, operands(p)),))


def gemv_use(p: Product, device: Device, config: Config, given: Operands, norm: Norm = NO_NORM) -> KernelUse:
    """One launch. `norm`: of what goes in (squares) or comes out (residual)."""
    constants = {**config, "TOKENS": next_power_of_2(p.tokens), **norm.constants}
    return product_use(p, device, SOURCE, (programs(p, config), 1, 1), constants, given, NAMES)


def programs(p: Product, config: Config) -> int:
    return cdiv(p.n, config["ROWS"])
