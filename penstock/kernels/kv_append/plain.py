"""kv_append alone: models without rotary embedding, and the parts of rope_append."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.rope_append import position
from penstock.kernels.tactic import Config, Draft, Tactic, inputs


class Plain(Tactic):
    op, name = "kv_append", "plain"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return position.refusal(site, (0, 1, 2), int(site.inputs[0].shape[4]), device)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return position.configs(int(site.inputs[0].shape[2]), int(site.inputs[0].shape[4]), sizes["T"])

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        kv, k, v = site.inputs[:3]
        heads, block, size = map(int, kv.shape[2:])
        signature = (
            ("kv_ptr", gpu.pointer(kv)), ("k_ptr", gpu.pointer(k)), ("v_ptr", gpu.pointer(v)),
            ("positions_ptr", "*i32"), ("rows_ptr", "*i32"), ("table_ptr", "*i32"), ("M", "i32"),
        )  # fmt: skip
        constants = {"K": heads, **position.head(size), "B": block}
        args = (*inputs(*range(6)), *gpu.integers(sizes["M"]))
        return Draft((position.use("kv_append", signature, constants, args, sizes["T"], heads, device, config),))
