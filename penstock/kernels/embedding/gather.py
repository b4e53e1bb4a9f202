"""Copying rows that indices choose."""

from __future__ import annotations

from math import prod

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
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

SOURCE = "penstock.kernels.embedding.gather_triton:gather"


class GatherEmbedding(Tactic):
    """A program for each row and block of its columns."""

    op = "embedding"
    name = "gather"
    indices, table = 0, 1  # which input is which

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if site.inputs[self.indices].format.name != "i32":
            return f"indices are {site.inputs[self.indices].format}, not i32"
        if not all(isinstance(d, int) for d in site.inputs[self.table].shape[1:]):
            return f"rows of {site.inputs[self.table]} have a run-time size"
        return gpu.refusal(site, device)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        whole = max(32, next_power_of_2(self.width(site)))
        shapes = ((1024, 4), (2048, 4), (512, 2), (4096, 8))
        return tuple({"block": b, "warps": w} for b, w in dict.fromkeys((min(b, whole), w) for b, w in shapes))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        width, y = self.width(site), site.outputs[0]
        kernel = TritonKernel(
            SOURCE,
            (("indices", "*i32"), ("table", gpu.pointer(y)), ("y", gpu.pointer(y))),
            (("E", width), ("BLOCK", config["block"]), gpu.pdl(device)),
            config["warps"],
        )
        rows = prod(y.concrete(sizes)) // width
        args = (*inputs(self.indices, self.table), *outputs(0))
        return Draft((KernelUse(kernel, (rows, cdiv(width, config["block"]), 1), args),))

    def width(self, site: Site) -> int:
        """Numbers of a row: all dimensions of the table but the first."""
        return prod(d for d in site.inputs[self.table].shape[1:] if isinstance(d, int))
