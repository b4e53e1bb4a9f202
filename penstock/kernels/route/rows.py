"""Choosing experts, some tokens a program."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, TritonKernel, cdiv, inputs, outputs

SOURCE = "penstock.kernels.route.rows_triton:route"
MAX_EXPERTS = 1024  # a row is held by one program
ATTRS = {
    "SCORE": ("score", "softmax"), "RENORMALIZE": ("renormalize", 0), "GROUPS": ("groups", 0),
    "KEPT": ("kept_groups", 0), "TOP": ("group_top", 1), "FACTOR": ("factor", 1.0),
}  # fmt: skip
FEW = ((1, 1), (1, 2), (1, 4))  # (ROWS, warps)
MANY = ((4, 1), (8, 2), (16, 4), (8, 4), (1, 1))
MANY_TOKENS = 64


class Rows(Tactic):
    """The best of a row, removed, and again: a few rounds over numbers that stay in registers."""

    op = "route"
    name = "rows"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if why := gpu.refusal(site, device):
            return why
        experts = gpu.width(site.inputs[0])
        return f"{experts} experts; made for up to {MAX_EXPERTS}" if experts > MAX_EXPERTS else None

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        shapes = FEW if gpu.rows(site.inputs[0], sizes) < MANY_TOKENS else MANY
        return tuple({"ROWS": rows, "warps": warps} for rows, warps in shapes)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        scores, biased = site.inputs[0], len(site.inputs) > 1
        tokens = gpu.rows(scores, sizes)
        pointers = ("scores", "*fp32"), *((("bias", "*fp32"),) if biased else ()), ("experts", "*i32")
        constants = {name: site.attr(*attr) for name, attr in ATTRS.items()}
        constants |= {"X": gpu.width(scores), "ROWS": config["ROWS"], "CHOSEN": site.attr("chosen")}
        kernel = TritonKernel(
            SOURCE,
            (*pointers, ("weights", "*fp32"), ("tokens", "i32")),
            (*constants.items(), *(() if biased else (("bias", None),)), gpu.pdl(device)),
            config["warps"],
        )
        args = (*inputs(*range(len(site.inputs))), *outputs(0, 1), Arg("int", tokens))
        return Draft((KernelUse(kernel, (cdiv(tokens, config["ROWS"]), 1, 1), args),))
