"""The scan with a program for each sequence, head and part of its numbers."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.causal_conv.by_slot import MAX_SEQUENCES
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

SOURCE = "penstock.kernels.selective_scan.by_token_triton:selective_scan"
HELD = 64  # numbers of the state that a thread holds, at most
MAX_STATE = 4096


class ByToken(Tactic):
    """The state stays in registers from a sequence's first token in the step to its last."""

    op, name = "selective_scan", "by_token"
    long = 3  # the dimension of the state that a program has whole

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if sizes["S"] > MAX_SEQUENCES:
            return f"{sizes['S']} sequences; at most {MAX_SEQUENCES}"
        if int(site.inputs[0].shape[self.long]) > MAX_STATE:
            return f"states of {site.inputs[0].shape[self.long]} numbers; at most {MAX_STATE}"
        return gpu.refusal(site, device, (1, 2))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return configs(int(site.inputs[0].shape[2]), int(site.inputs[0].shape[3]), sizes["S"])

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        _, heads, size, width = (0, *map(int, site.inputs[0].shape[1:]))
        floats = ("state_ptr", "x_ptr", "dt_ptr", "decay_ptr", "dt_bias_ptr", "skip_ptr")
        signature = (
            *((name, gpu.pointer(type)) for name, type in zip(floats, site.inputs, strict=False)),
            *((name, "*i32") for name in ("query_start_ptr", "query_len_ptr", "context_len_ptr", "slot_ptr")),
            ("y_ptr", gpu.pointer(site.outputs[1])), ("T", "i32"), ("S", "i32"),
        )  # fmt: skip
        constants = {
            "H": heads, "P": size, "W": width, "WP": next_power_of_2(width), "G": int(site.attr("groups")),
            "SP": next_power_of_2(sizes["S"]), "BLOCK": config["BLOCK"], "LEAST": float(site.attr("least", 0.0)),
            "MOST": float(site.attr("most", 0.0)),
        }  # fmt: skip
        kernel = TritonKernel(SOURCE, signature, (*constants.items(), gpu.pdl(device)), config["warps"])
        args = (*inputs(*range(10)), *outputs(1), *gpu.integers(sizes["T"], sizes["S"]))
        return Draft((KernelUse(kernel, (sizes["S"] + 1, heads, cdiv(size, config["BLOCK"])), args),))


def configs(size: int, width: int, sequences: int) -> tuple[Config, ...]:
    """BLOCK: how many of `size` numbers, of `width` numbers of state each, a program has; few where sequences are."""
    size, width = next_power_of_2(size), next_power_of_2(width)
    shapes = ((16, 1), (8, 1), (32, 2), (64, 4)) if sequences < 16 else ((32, 2), (64, 4), (16, 1))
    found = [{"BLOCK": min(b, size), "warps": w} for b, w in shapes if b * width <= 32 * HELD * w]
    found = found or [{"BLOCK": 1, "warps": min(32, next_power_of_2(cdiv(width, 32 * HELD)))}]
    return tuple({tuple(c.items()): c for c in found}.values())
