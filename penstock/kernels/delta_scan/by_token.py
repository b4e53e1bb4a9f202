"""The gated delta rule with a program for each sequence, head and part of its values."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.selective_scan.by_token import ByToken, configs
from penstock.kernels.tactic import (
    Config,
    Draft,
    KernelUse,
    TritonKernel,
    cdiv,
    inputs,
    next_power_of_2,
    outputs,
)

SOURCE = "penstock.kernels.delta_scan.by_token_triton:delta_scan"


class DeltaByToken(ByToken):
    op = "delta_scan"
    long = 2  # the dimension of the state that a program has whole

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        _, _, keys, values = site.inputs[0].shape
        return configs(int(values), int(keys), sizes["S"])

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        _, heads, size, width = (0, *map(int, site.inputs[0].shape[1:]))
        floats = ("state_ptr", "x_ptr", "steps_ptr", "decay_ptr", "dt_bias_ptr")
        signature = (
            *((name, gpu.pointer(type)) for name, type in zip(floats, site.inputs, strict=False)),
            *((name, "*i32") for name in ("query_start_ptr", "query_len_ptr", "context_len_ptr", "slot_ptr")),
            ("y_ptr", gpu.pointer(site.outputs[1])), ("T", "i32"), ("S", "i32"),
        )  # fmt: skip
        constants = {
            "H": heads, "K": size, "KP": next_power_of_2(size), "V": width,
            "G": (gpu.width(site.inputs[1]) - heads * width) // (2 * size), "SP": next_power_of_2(sizes["S"]),
            "BLOCK": config["BLOCK"], "ROOT": float(size**0.5),
        }  # fmt: skip
        kernel = TritonKernel(SOURCE, signature, (*constants.items(), gpu.pdl(device)), config["warps"])
        args = (*inputs(*range(9)), *outputs(1), *gpu.integers(sizes["T"], sizes["S"]))
        return Draft((KernelUse(kernel, (sizes["S"] + 1, heads, cdiv(width, config["BLOCK"])), args),))
