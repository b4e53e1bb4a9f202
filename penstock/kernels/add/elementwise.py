"""Element by element over flat tensors: each number is read once and written once."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, TritonKernel, cdiv, inputs, outputs

SOURCE = "penstock.kernels.add.elementwise_triton"
FEW = ({"block": 256, "warps": 2}, {"block": 512, "warps": 4}, {"block": 1024, "warps": 4})
MANY = ({"block": 2048, "warps": 4}, {"block": 1024, "warps": 4}, {"block": 4096, "warps": 8})
MANY_NUMBERS = 1 << 18
BY = {
    "scale": "factor",
    "clip": "limit",
    "softcap": "cap",
    "activate": "act",
    "widen": "",
}  # ops of one operand: their attribute
MOST_NUMBERS = (1 << 31) - 8192  # positions are 32-bit


class ElementwiseAdd(Tactic):
    """A flat stream; shapes do not matter."""

    op = "add"
    name = "elementwise"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        count = _count(site, sizes)
        if count > MOST_NUMBERS:
            return f"{count} numbers; at most {MOST_NUMBERS}"
        return gpu.refusal(site, device, tuple(range(len(site.inputs))))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return FEW if _count(site, sizes) < MANY_NUMBERS else MANY

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        names = ("x", "y", "z") if site.op == "add" else ("x", "z")
        by = BY.get(site.op, "")
        what = (("OP", site.op), ("BY", site.attr(by) if by else 0)) if site.op in BY else ()
        kernel = TritonKernel(
            f"{SOURCE}:{'pointwise' if what else 'add'}",
            (*zip(names, map(gpu.pointer, (*site.inputs, *site.outputs)), strict=True), ("count", "i32")),
            (*what, ("BLOCK", config["block"]), gpu.pdl(device)),
            config["warps"],
            aligned=("count",) if gpu.width(site.inputs[0]) % 16 == 0 else (),
        )
        count = _count(site, sizes)
        args = (*inputs(*range(len(site.inputs))), *outputs(0), *gpu.integers(count))
        return Draft((KernelUse(kernel, (cdiv(count, config["block"]), 1, 1), args),))


def _count(site: Site, sizes: Sizes) -> int:
    return gpu.rows(site.inputs[0], sizes) * gpu.width(site.inputs[0])
