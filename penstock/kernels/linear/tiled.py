"""Products of many tokens, on the tensor cores: bound by arithmetic."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels.linear.product import (
    Product,
    distinct,
    fitting_columns,
    operands,
    product_use,
    refusal,
    shared_limit,
)
from penstock.kernels.tactic import Config, Draft, Tactic, cdiv

SOURCE = "penstock.kernels.linear.matmul_triton:tiled"
NAMES = ("x", "w", "bias", "y")
MIN_TOKENS = 33
GROUP = 8  # tiles of tokens that share a stretch of w in the L2

# (TOKENS, ROWS, COLUMNS, STAGES, warps)
SHAPES = (
    (128, 256, 64, 3, 8),
    (256, 128, 64, 3, 8),
    (128, 256, 64, 4, 8),
    (128, 128, 64, 4, 8),
    (128, 128, 64, 3, 4),
    (64, 256, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
)
SHAPES_F32 = ((64, 64, 32, 3, 4), (64, 64, 16, 3, 8))


class Tiled(Tactic):
    """One output tile per program, operands pipelined through shared memory."""

    op = "linear"
    name = "tiled"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return refusal(site, sizes, device, MIN_TOKENS)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        p = Product.of(site, sizes)
        shapes = SHAPES_F32 if p.w.bytes == 4 else SHAPES
        configs = (
            {"TOKENS": t, "ROWS": r, "COLUMNS": fitting_columns(c, p.k), "GROUP": GROUP, "STAGES": s, "warps": warps}
            for t, r, c, s, warps in shapes
            if s * (t + r) * c * p.w.bytes <= shared_limit(device)
        )
        return distinct(sorted(configs, key=lambda c: _cost(p, c, device)))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        p = Product.of(site, sizes)
        grid = (cdiv(p.tokens, config["TOKENS"]) * cdiv(p.n, config["ROWS"]), 1, 1)
        return Draft((product_use(p, device, SOURCE, grid, config, operands(p), NAMES),))


def _cost(p: Product, c: Config, device: Device) -> int:
    """Waves of programs times the work of a tile: arithmetic goes by its area, traffic by its sides."""
    tiles = cdiv(p.tokens, c["TOKENS"]) * cdiv(p.n, c["ROWS"])
    work = c["TOKENS"] * c["ROWS"] + 64 * (c["TOKENS"] + c["ROWS"])
    return cdiv(tiles, max(1, device.multiprocessors)) * work
