"""A tile of queries a program, over every key of its sequence."""

from __future__ import annotations

from collections.abc import Mapping

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

SOURCE = "penstock.kernels.encoder_attention.whole_triton"
MAX_HEAD, MAX_SEQUENCES = 256, 4096
Signature = tuple[tuple[str, str], ...]


class Whole(Tactic):
    """Sequences must stand in the run in order and without gaps, as `prepare` puts them; tokens behind the last become
    zero."""

    op, name = "encoder_attention", "whole"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return refusal(site, sizes, device, (0, 1, 2))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return configs(site, sizes)

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        pointers = ("q_ptr", "k_ptr", "v_ptr", "query_start_ptr", "query_len_ptr", "bias_ptr")[: len(site.inputs)]
        bias: dict[str, int | None] = {"R": 1, "bias_ptr": None}
        if len(site.inputs) > 5:
            bias = {"R": int(site.inputs[5].shape[1])}
        types = map(gpu.pointer, (*site.inputs, site.outputs[0]))
        signature = (*zip((*pointers, "out_ptr"), types, strict=True), ("T", "i32"), ("S", "i32"))
        args = (*inputs(*range(len(site.inputs))), *outputs(0), *gpu.integers(sizes["T"], sizes["S"]))
        return draft("over_rows", signature, args, bias, site, sizes, device, config)


def refusal(site: Site, sizes: Sizes, device: Device, floats: tuple[int, ...]) -> str | None:
    if why := gpu.refusal(site, device, floats, 80):
        return why
    formats = {site.inputs[i].format for i in floats if site.inputs[i].format.bytes > 1} | {site.outputs[0].format}
    if len(formats) > 1:
        return f"queries, keys and values must share one format, not {', '.join(sorted(map(str, formats)))}"
    if head_size(site) > MAX_HEAD:
        return f"heads of {head_size(site)} numbers; at most {MAX_HEAD}"
    return f"{sizes['S']} sequences; at most {MAX_SEQUENCES}" if sizes["S"] > MAX_SEQUENCES else None


def head_size(site: Site) -> int:
    return gpu.width(site.inputs[0]) // int(site.attr("heads"))


def configs(site: Site, sizes: Sizes) -> tuple[Config, ...]:
    """QT, BN: queries and keys of a tile. Few queries a row fill no large tile."""
    wide = head_size(site) > 128
    if site.inputs[0].format.bytes == 4:  # has no tensor cores here: small tiles, or registers spill
        return ({"QT": 16, "BN": 16 if wide else 32, "warps": 8, "stages": 2},)
    keys, warps = (32, 8) if wide else (64, 4)
    small = {"QT": 16, "BN": keys, "warps": 4, "stages": 3}
    large = {"QT": 64, "BN": keys, "warps": warps, "stages": 2}
    return (large, small) if sizes["T"] >= 16 * sizes["S"] else (small, large)


def draft_over_cache(
    function: str, rows: Mapping[str, int], site: Site, sizes: Sizes, device: Device, config: Config
) -> Draft:
    """Of queries, input 0, over a cache, input 1. rows: of numbers a sequence, each pointer's name and its input."""
    pool = site.inputs[1]
    own: dict[str, int | None] = {"K": int(pool.shape[2]), "B": int(pool.shape[3])}
    signature = (
        ("q_ptr", gpu.pointer(site.inputs[0])), ("kv_ptr", gpu.pointer(pool)), *((name, "*i32") for name in rows),
        ("out_ptr", gpu.pointer(site.outputs[0])), ("T", "i32"), ("S", "i32"), ("M", "i32"),
    )  # fmt: skip
    args = (*inputs(0, 1, *rows.values()), *outputs(0), *gpu.integers(sizes["T"], sizes["S"], sizes["M"]))
    return draft(function, signature, args, own, site, sizes, device, config)


def draft(
    function: str, signature: Signature, args: tuple[Arg, ...], own: dict[str, int | None], site: Site, sizes: Sizes,
    device: Device, config: Config,
) -> Draft:  # fmt: skip
    """One launch. Each sequence, and the padding, ends with a tile that is not full."""
    heads, size, tile = int(site.attr("heads")), head_size(site), config["QT"]
    constants = {
        **own, "H": heads, "D": size, "DP": max(16, next_power_of_2(size)), "SP": next_power_of_2(sizes["S"]),
        "QT": tile, "BN": config["BN"], "SCALE": float(site.attr("scale")),
    }  # fmt: skip
    named = (*constants.items(), gpu.pdl(device))
    kernel = TritonKernel(f"{SOURCE}:{function}", signature, named, config["warps"], config["stages"])
    tiles = cdiv(sizes["T"], tile) + min(sizes["S"], sizes["T"]) + 1
    return Draft((KernelUse(kernel, (tiles, heads, 1), args),))
