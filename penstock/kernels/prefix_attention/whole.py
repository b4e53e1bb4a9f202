"""A tile of queries a program, over all pages that one of them sees."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.encoder_attention import whole
from penstock.kernels.tactic import Config, Draft, Tactic, inputs, outputs


class Whole(Tactic):
    """As for an encoder's own attention; the heads of a group each read its keys."""

    op, name = "prefix_attention", "whole"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return whole.refusal(site, sizes, device, (0, 1))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return whole.configs(site, sizes)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        pool = site.inputs[1]
        own: dict[str, int | None] = {"K": int(pool.shape[2]), "B": int(pool.shape[3])}
        rows = ("query_start_ptr", "query_len_ptr", "context_len_ptr", "prefix_len_ptr", "table_ptr")
        signature = (
            ("q_ptr", gpu.pointer(site.inputs[0])), ("kv_ptr", gpu.pointer(pool)), *((name, "*i32") for name in rows),
            ("out_ptr", gpu.pointer(site.outputs[0])), ("T", "i32"), ("S", "i32"), ("M", "i32"),
        )  # fmt: skip
        args = (*inputs(*range(7)), *outputs(0), *gpu.integers(sizes["T"], sizes["S"], sizes["M"]))
        return whole.draft("over_prefix", signature, args, own, site, sizes, device, config)
