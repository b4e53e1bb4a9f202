"""rope_append in one kernel: each number of qkv is read once from memory, and written where it belongs."""

from __future__ import annotations

from typing import Any

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.rope_append import position
from penstock.kernels.tactic import Config, Draft, Tactic, cdiv, inputs, outputs

MANY_TOKENS = 256  # from there on programs of one token fill the device, and angles need not be worked out twice


class Fused(Tactic):
    """Padding tokens get a query like any other and append nothing. Nothing is rounded between the parts."""

    op, name, version = "rope_append", "fused", 3

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return position.refusal(site, (0, 1, *range(6, len(site.inputs))), _geometry(site)["D"], device)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        """HB: heads at a time; TURNS: times."""
        each = position.configs(_heads(site), _geometry(site)["D"], sizes["T"])
        if sizes["T"] < MANY_TOKENS:
            return tuple({**c, "TURNS": 1} for c in each)
        return tuple({**c, "TURNS": cdiv(_heads(site), c["HB"])} for c in each)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        qkv, kv = site.inputs[:2]
        norms = site.inputs[6:] or (qkv, qkv)  # not read where there are none
        signature = (
            ("qkv_ptr", gpu.pointer(qkv)), ("kv_ptr", gpu.pointer(kv)), ("positions_ptr", "*i32"),
            ("freqs_ptr", "*fp32"), ("rows_ptr", "*i32"), ("table_ptr", "*i32"),
            ("q_norm_ptr", gpu.pointer(norms[0])), ("k_norm_ptr", gpu.pointer(norms[1])),
            ("q_out_ptr", gpu.pointer(site.outputs[0])), ("M", "i32"),
        )  # fmt: skip
        constants = {
            **_geometry(site),
            **position.rotation(site, site.inputs[3]),
            "NORM": len(site.inputs) > 6,
            "EPS": float(site.attr("eps", 0.0)),
            "OFFSET": float(site.attr("offset", 0.0)),
            "TURNS": config["TURNS"],
        }
        args = (*inputs(*range(6)), *(inputs(6, 7) if len(site.inputs) > 6 else inputs(0, 0)), *outputs(0))
        args = (*args, *gpu.integers(sizes["M"]))
        return Draft(
            (position.use("rope_append", signature, constants, args, sizes["T"], _heads(site), device, config),)
        )


def _geometry(site: Site) -> dict[str, Any]:
    kv_heads, block, size = site.inputs[1].shape[2:]
    return {"H": site.attr("heads"), "K": kv_heads, "B": block, **position.head(int(size))}


def _heads(site: Site) -> int:
    return int(site.attr("heads")) + 2 * int(site.inputs[1].shape[2])
