"""A weight matrix times a few tokens, on the tensor cores: the weights are the tall operand, the tokens pad to 16."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.kernels.linear.product import (
    Product,
    distinct,
    fitting_columns,
    operands,
    product_use,
    refusal,
    shared_limit,
)
from penstock.kernels.tactic import Config, Draft, Tactic, cdiv, next_power_of_2

SOURCE = "penstock.kernels.linear.matmul_triton:skinny"
NAMES = ("x", "w", "bias", "y", "parts", "counters")
MIN_TOKENS, MAX_TOKENS = 2, 64
PREFERRED_SHARED = 100 << 10  # bytes; so that two programs share an SM, and the next kernel's can start early

# (ROWS, COLUMNS, STAGES, warps), best first.
SHAPES = ((64, 128, 4, 4), (64, 128, 3, 4), (128, 64, 4, 4), (64, 64, 4, 4))
SHAPES_F32 = ((64, 32, 3, 4), (128, 32, 3, 8))
WAVES = (2, 4, 1)  # programs per multiprocessor to aim at, by splitting K
MAX_SPLIT = 16


class Skinny(Tactic):
    """Tiles of w against all tokens; K split over programs, the last of a tile adds partial sums in a fixed order."""

    op = "linear"
    name = "skinny"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return refusal(site, sizes, device, MIN_TOKENS, MAX_TOKENS)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        p = Product.of(site, sizes)
        fitting = (c for c in _configs(p, device) if _shared(p, c) <= shared_limit(device))
        return distinct(sorted(fitting, key=lambda c: _shared(p, c) > PREFERRED_SHARED))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        p, split = Product.of(site, sizes), config["SPLIT"]
        given, constants = operands(p), {**config, "TOKENS": _token_tile(p)}
        tiles = cdiv(p.n, config["ROWS"])
        if split == 1:
            return Draft((product_use(p, device, SOURCE, (tiles, 1, 1), constants, given, NAMES),))
        given = {**given, "parts": (Arg("workspace", 0), "*fp32"), "counters": (Arg("zeroed", 0), "*i32")}
        use = product_use(p, device, SOURCE, (tiles, split, 1), constants, given, NAMES)
        return Draft((use,), split * p.tokens * p.n * 4, tiles * 4)


def _token_tile(p: Product) -> int:
    return max(16, next_power_of_2(p.tokens))


def _configs(p: Product, device: Device) -> Iterator[Config]:
    """Every shape with the first aim of WAVES, then every second one with the others."""
    shapes = SHAPES_F32 if p.w.bytes == 4 else SHAPES
    for waves in WAVES:
        for rows, columns, stages, warps in shapes if waves == WAVES[0] else shapes[::2]:
            columns = fitting_columns(columns, p.k)
            split = _split(p, rows, columns, waves * max(1, device.multiprocessors))
            lines = max(1, columns * p.w.bytes // 128)
            tile = {"ROWS": rows, "COLUMNS": columns, "STAGES": stages, "warps": warps}
            yield {**tile, "SPLIT": split, "PREFETCH": lines}


def _split(p: Product, rows: int, columns: int, programs: int) -> int:
    """The least power of two that makes `programs`, while a share of K is still a few tiles long."""
    split = 1
    while split < MAX_SPLIT and cdiv(p.n, rows) * split * 2 <= programs and p.k >= split * 2 * columns * 2:
        split *= 2
    return split


def _shared(p: Product, config: Config) -> int:
    return config["STAGES"] * (config["ROWS"] + _token_tile(p)) * config["COLUMNS"] * p.w.bytes
