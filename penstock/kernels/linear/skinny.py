"""A weight matrix times a few tokens, on the tensor cores: the weights are the tall operand, the tokens pad to 16."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.linear.product import Product, distinct, fitting_columns, product_use, refusal, shared_limit
from penstock.kernels.tactic import (
    Config,
    Draft,
    KernelUse,
    Tactic,
    TritonKernel,
    cdiv,
    inputs,
    next_power_of_2,
    outputs,
)

MODULE = "penstock.kernels.linear.matmul_triton"
MIN_TOKENS, MAX_TOKENS = 2, 64
SUM_COLUMNS = 512  # of the sum over the split, per program

PREFERRED_SHARED = 100 << 10  # bytes; so that two programs share an SM, and the next kernel's can start early

# (ROWS, COLUMNS, STAGES, warps), best first.
SHAPES = ((64, 128, 4, 4), (64, 128, 3, 4), (128, 64, 4, 4), (64, 64, 4, 4))
SHAPES_F32 = ((64, 32, 3, 4), (128, 32, 3, 8))
WAVES = (2, 4, 1)  # programs per multiprocessor to aim at, by splitting K
MAX_SPLIT = 16


class Skinny(Tactic):
    """Tiles of w against all tokens; K split over programs, partial sums added in a fixed order by a second kernel."""

    op = "linear"
    name = "skinny"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return refusal(site, sizes, device, MIN_TOKENS, MAX_TOKENS)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        p = Product.of(site, sizes)
        fitting = (c for c in _configs(p, device) if _shared(p, c) <= shared_limit(device))
        return distinct(sorted(fitting, key=lambda c: _shared(p, c) > PREFERRED_SHARED))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        p = Product.of(site, sizes)
        split = config["SPLIT"]
        constants = {**config, "TOKENS": _token_tile(p)}
        grid = (cdiv(p.n, config["ROWS"]), split, 1)
        source = f"{MODULE}:skinny"
        if split == 1:
            return Draft((product_use(p, device, source, grid, constants),))
        parts = Arg("workspace", 0)
        steps = (product_use(p, device, source, grid, constants, parts), _sum(p, device, parts, split))
        return Draft(steps, split * p.tokens * p.n * 4)


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


def _sum(p: Product, device: Device, parts: Arg, split: int) -> KernelUse:
    signature = [("parts", "*fp32")]
    args = [parts]
    constants = [("N", p.n), ("SPLIT", split), ("COLUMNS", SUM_COLUMNS), ("ACT", p.act), gpu.pdl(device)]
    if p.bias is None:
        constants.append(("bias", None))
    else:
        signature.append(("bias", f"*{p.bias.triton_dtype}"))
        args.extend(inputs(2))
    signature.extend([("y", f"*{p.out.triton_dtype}"), ("tokens", "i32")])
    args.extend([*outputs(0), Arg("int", p.tokens)])
    kernel = TritonKernel(f"{MODULE}:sum_split", tuple(signature), tuple(constants))
    return KernelUse(kernel, (cdiv(p.n, SUM_COLUMNS), p.tokens, 1), tuple(args))
