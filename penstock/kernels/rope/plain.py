"""rope alone, for graphs where nothing is appended and for the parts of rope_append."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.rope_append import position
from penstock.kernels.tactic import Config, Draft, Tactic, inputs, outputs


class Plain(Tactic):
    op, name = "rope", "plain"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return position.refusal(site, (0,), _size(site), device)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return position.configs(site.attr("heads"), _size(site), sizes["T"])

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        heads = int(site.attr("heads"))
        signature = (
            ("x_ptr", gpu.pointer(site.inputs[0])), ("positions_ptr", "*i32"), ("freqs_ptr", "*fp32"),
            ("rows_ptr", "*i32"), ("out_ptr", gpu.pointer(site.outputs[0])),
        )  # fmt: skip
        rotation = position.rotation(site, site.inputs[2])
        constants = {"H": heads, **position.head(_size(site)), **rotation}
        args = (*inputs(*range(4)), *outputs(0))
        return Draft((position.use("rope", signature, constants, args, sizes["T"], heads, device, config),))


def _size(site: Site) -> int:
    return int(site.inputs[0].shape[-1]) // int(site.attr("heads"))
