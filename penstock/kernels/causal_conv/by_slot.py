"""The convolution with a program for each sequence and block of channels."""

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

SOURCE = "penstock.kernels.causal_conv.by_slot_triton:causal_conv"
MAX_SEQUENCES = 4096  # the programs that clear scan them
MAX_WIDTH = 16  # inputs of a channel; each is a load


class BySlot(Tactic):
    """All tokens of a sequence fall to the same programs, so that nobody reads a state that another has replaced."""

    op, name = "causal_conv", "by_slot"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if sizes["S"] > MAX_SEQUENCES:
            return f"{sizes['S']} sequences; at most {MAX_SEQUENCES}"
        if gpu.width(site.inputs[2]) > MAX_WIDTH:
            return f"{gpu.width(site.inputs[2])} inputs of a channel; at most {MAX_WIDTH}"
        return gpu.refusal(site, device, (0, 1, 2))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        """Few tokens a sequence: many channels at once; long ones: tiles of tokens."""
        long = sizes["T"] >= 16 * sizes["S"]
        shapes = ((32, 64, 4), (16, 64, 2), (64, 32, 4)) if long else ((1, 128, 1), (1, 256, 2), (2, 64, 1))
        return tuple({"TOKENS": t, "BLOCK": b, "warps": w} for t, b, w in shapes)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        (channels, width), biased = map(int, site.inputs[2].shape), len(site.inputs) > 7
        floats = {"state_ptr": 0, "x_ptr": 1, "w_ptr": 2, **({"bias_ptr": 7} if biased else {})}
        signature = (
            *((name, gpu.pointer(site.inputs[i])) for name, i in floats.items()),
            *((name, "*i32") for name in ("query_start_ptr", "query_len_ptr", "context_len_ptr", "slot_ptr")),
            ("y_ptr", gpu.pointer(site.outputs[1])), ("T", "i32"), ("S", "i32"),
        )  # fmt: skip
        constants = {
            **({} if biased else {"bias_ptr": None}), "C": channels, "W": width, "WP": next_power_of_2(width - 1),
            "SP": next_power_of_2(sizes["S"]), "TOKENS": config["TOKENS"], "BLOCK": config["BLOCK"],
            "ACT": str(site.attr("act")),
        }  # fmt: skip
        kernel = TritonKernel(SOURCE, signature, (*constants.items(), gpu.pdl(device)), config["warps"])
        numbers: tuple[Arg, ...] = gpu.integers(sizes["T"], sizes["S"])
        args = (*inputs(*floats.values(), 3, 4, 5, 6), *outputs(1), *numbers)
        return Draft((KernelUse(kernel, (sizes["S"] + 1, cdiv(channels, config["BLOCK"]), 1), args),))
