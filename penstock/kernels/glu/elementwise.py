"""Gating of two tensors by one kernel."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
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

SOURCE = "penstock.kernels.glu.glu_triton:glu"
# (ROWS, COLUMNS, warps), best first: narrow programs spread one token over the device, tall ones suit many.
FEW = ((1, 256, 1), (1, 512, 2), (1, 1024, 4))
MANY = ((1, 2048, 4), (2, 2048, 8), (1, 1024, 4), (4, 1024, 8), (1, 2048, 8))
MANY_TOKENS = 64


class Elementwise(Tactic):
    """Both operands in, one result out, each read or written once."""

    op = "glu"
    name = "elementwise"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return gpu.refusal(site, device, tuple(range(len(site.inputs))))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        width = max(32, next_power_of_2(site.outputs[0].concrete(sizes)[-1]))
        shapes = FEW if gpu.rows(site.outputs[0], sizes) < MANY_TOKENS else MANY
        configs = [{"ROWS": r, "COLUMNS": min(c, width), "warps": w} for r, c, w in shapes]
        return tuple({tuple(c.items()): c for c in configs}.values())

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        y = site.outputs[0]
        features = y.concrete(sizes)[-1]
        packed = len(site.inputs) == 1
        pointer = gpu.pointer(y)
        constants = {"F": features, "STRIDE": features * (1 + packed), "OFFSET": features * packed}
        constants |= {"ROWS": config["ROWS"], "COLUMNS": config["COLUMNS"]}
        kernel = TritonKernel(
            SOURCE,
            (("gate", pointer), ("up", pointer), ("y", pointer), ("tokens", "i32")),
            (*constants.items(), ("ACT", str(site.attr("act"))), gpu.pdl(device)),
            config["warps"],
        )
        tokens = gpu.rows(site.outputs[0], sizes)
        grid = (cdiv(tokens, config["ROWS"]), cdiv(features, config["COLUMNS"]), 1)
        gate_up = inputs(0, 0) if packed else inputs(0, 1)
        return Draft((KernelUse(kernel, grid, (*gate_up, *outputs(0), Arg("int", tokens))),))
