"""Normalisation by the root mean square or about the mean: whole rows in registers, read once and written once."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.ir.graph import Type
from penstock.kernels import gpu
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

SOURCE = "penstock.kernels.rms_norm.rms_norm_triton"
LONGEST = 16384  # numbers in a row: 32 in each thread's registers at 16 warps
POINTERS = ("x", "residual", "w", "bias", "y", "total")
TILE = 4096  # numbers that a program of several short rows holds


class RowwiseNorm(Tactic):
    """One program for each row, or for several short ones."""

    op = "rms_norm"
    name = "rowwise"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        width = _width(site)
        if width > LONGEST:
            return f"rows of {width} numbers; at most {LONGEST}"
        return gpu.refusal(site, device, tuple(range(len(site.inputs))))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        block, rows = next_power_of_2(_width(site)), _rows(site, sizes)
        if block > TILE // 4:
            warps = [w for w in (8, 16, 4) if 2 <= block // (32 * w) <= 64]
            return tuple({"rows": 1, "warps": w} for w in warps)
        most = next_power_of_2(rows)
        tall = TILE // block
        tiles = ((1, 1), (4, 4), (tall, 8)) if rows <= 512 else ((tall, 8), (tall, 4), (4, 4))
        return tuple({"rows": r, "warps": w} for r, w in dict.fromkeys((min(r, most), w) for r, w in tiles))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        names = _names(site)
        absent = tuple((name, None) for name in POINTERS if name not in names)
        kernel = TritonKernel(
            f"{SOURCE}:rms_norm",
            (*zip(names, map(gpu.pointer, (*site.inputs, *site.outputs)), strict=True), ("rows", "i32")),
            (*absent, *_constants(site, config, device)),
            config["warps"],
        )
        rows = _rows(site, sizes)
        args = (*inputs(*range(len(site.inputs))), *outputs(*range(len(site.outputs))), *gpu.integers(rows))
        return Draft((KernelUse(kernel, (cdiv(rows, config["rows"]), 1, 1), args),))


def _names(site: Site) -> tuple[str, ...]:
    """The kernel's pointers that the site has, in its order."""
    adds = site.op.startswith("add_")
    biased = len(site.inputs) > 2 + adds
    chosen = {"residual": adds, "bias": biased, "total": adds}
    return tuple(name for name in POINTERS if chosen.get(name, True))


def _weight(site: Site) -> Type:
    return site.inputs[_names(site).index("w")]


def _width(site: Site) -> int:
    """Numbers that are normalised together."""
    return gpu.width(_weight(site))


def _rows(site: Site, sizes: Sizes) -> int:
    return gpu.rows(site.inputs[0], sizes) * (gpu.width(site.inputs[0]) // _width(site))


def _constants(site: Site, config: Config, device: Device) -> tuple[tuple[str, int | float | bool], ...]:
    width, shape = _width(site), _weight(site).shape
    heads = int(shape[0]) if len(shape) > 1 else 1
    norm = (("E", width), ("EPS", float(site.attr("eps"))), ("OFFSET", float(site.attr("offset", 0.0))))
    kind = (("HEADS", heads), ("CENTRED", site.op.endswith("layer_norm")))
    return (*norm, *kind, ("ROWS", config["rows"]), ("BLOCK", next_power_of_2(width)), gpu.pdl(device))
