"""Gating of rows by one kernel, as `glu` streams its operands."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.glu.elementwise import Elementwise
from penstock.kernels.tactic import Config, Draft, KernelUse, TritonKernel, cdiv, inputs, outputs

SOURCE = "penstock.kernels.gate_rows.elementwise_triton:gate_rows"


class ElementwiseGateRows(Elementwise):
    op = "gate_rows"

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        (x, gate), y = site.inputs, site.outputs[0]
        width, tokens = gpu.width(y), gpu.rows(y, sizes)
        kernel = TritonKernel(
            SOURCE,
            (("x", gpu.pointer(x)), ("gate", gpu.pointer(gate)), ("y", gpu.pointer(y)), ("tokens", "i32")),
            (
                ("E", width),
                ("G", gpu.width(gate)),
                ("ROWS", config["ROWS"]),
                ("COLUMNS", config["COLUMNS"]),
                gpu.pdl(device),
            ),
            config["warps"],
        )
        grid = (cdiv(tokens, config["ROWS"]), cdiv(width, config["COLUMNS"]), 1)
        return Draft((KernelUse(kernel, grid, (*inputs(0, 1), *outputs(0), *gpu.integers(tokens))),))
