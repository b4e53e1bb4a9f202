"""Copying groups of columns, all groups by one kernel."""

from __future__ import annotations

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

SOURCE = "penstock.kernels.split.columns_triton:split"
MOST = 3  # groups


class SplitColumns(Tactic):
    """A program for each row and block of its columns; where a block straddles a border it writes to both sides."""

    op = "split"
    name = "columns"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if len(site.outputs) > MOST:
            return f"{len(site.outputs)} groups; at most {MOST}"
        if not isinstance(site.inputs[0].shape[-1], int):
            return f"rows of {site.inputs[0]} have a run-time size"
        return gpu.refusal(site, device)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        whole = max(32, next_power_of_2(sum(map(gpu.width, site.outputs))))
        shapes = ((1024, 4), (2048, 4), (512, 2), (4096, 8))
        return tuple({"block": b, "warps": w} for b, w in dict.fromkeys((min(b, whole), w) for b, w in shapes))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        x, groups = site.inputs[0], [gpu.width(t) for t in site.outputs]
        groups += [0] * (MOST - len(groups))
        kernel = TritonKernel(
            SOURCE,
            tuple((name, gpu.pointer(x)) for name in ("x", "y0", "y1", "y2")),
            (
                ("WIDTH", gpu.width(x)),
                *((f"N{i}", n) for i, n in enumerate(groups)),
                ("BLOCK", config["block"]),
                gpu.pdl(device),
            ),
            config["warps"],
        )
        last = len(site.outputs) - 1  # stands in for groups that there are not, and is not written twice
        args = (*inputs(0), *outputs(*(min(i, last) for i in range(MOST))))
        return Draft((KernelUse(kernel, (gpu.rows(x, sizes), cdiv(sum(groups), config["block"]), 1), args),))
