"""As rope, with twice as many heads of half the size."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.rope_append import position
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, TritonKernel, cdiv, inputs, outputs


class Halves(Tactic):
    op, name = "prefix_rope", "halves"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return position.refusal(site, (0,), _size(site), device)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return position.configs(_count(site), _size(site), sizes["T"])

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        rows = ("positions_ptr", "*i32"), ("freqs_ptr", "*fp32"), ("rows_ptr", "*i32"), ("prefix_len_ptr", "*i32")
        ends = ("x_ptr", gpu.pointer(site.inputs[0])), ("out_ptr", gpu.pointer(site.outputs[0]))
        sizes_of = {"H": _count(site), **position.head(_size(site)), "HALF": _size(site) // 2, "HB": config["HB"]}
        kernel = TritonKernel(
            "penstock.kernels.prefix_rope.halves_triton:prefix_rope", (ends[0], *rows, ends[1]),
            (*sizes_of.items(), gpu.pdl(device)), config["WARPS"],
        )  # fmt: skip
        grid = (sizes["T"], cdiv(_count(site), config["HB"]), 1)
        return Draft((KernelUse(kernel, grid, (*inputs(*range(5)), *outputs(0))),))


def _count(site: Site) -> int:
    return 2 * int(site.attr("heads"))


def _size(site: Site) -> int:
    return int(site.inputs[0].shape[-1]) // _count(site)
