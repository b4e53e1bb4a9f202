"""Attention for any ragged mixture: short rows split over their keys, long rows in tiles of queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
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

SOURCE = "penstock.kernels.attention.ragged_triton"
MAX_GROUP = 128  # query heads of a KV head; they share a tile
MAX_COMBINED = 16384  # numbers of a group of heads; more would not fit in the registers of `combine`
MAX_SHORT = 4  # queries of a row that is still split over its keys
MAX_SEQUENCES = 4096  # every program scans them
COMBINE_PROGRAMS = 8  # for each multiprocessor


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a site shapes its kernels."""

    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    pointer: str
    bytes: int

    @staticmethod
    def of(site: Site) -> Shape:
        kv = site.inputs[1]
        _, _, kv_heads, block, size = (0, *map(_int, kv.shape[1:]))
        return Shape(int(site.attr("heads")), kv_heads, size, block, gpu.pointer(kv), kv.format.bytes)

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def decode_rows(self) -> int:
        """Rows of a decode tile: the smallest that tensor cores take."""
        return max(16, next_power_of_2(self.group))

    @property
    def short(self) -> int:
        """A row of at most so many queries is split over its keys; its queries fill rows that one would leave empty."""
        return min(MAX_SHORT, self.decode_rows // self.group)

    @property
    def padded_size(self) -> int:
        return max(16, next_power_of_2(self.head_size))


def _int(dim: int | str) -> int:
    assert isinstance(dim, int), dim
    return dim


class Ragged(Tactic):
    """Two families of kernels under one fixed grid, right for whatever rows a step of the bucket holds.

    Rows of at most `Shape.short` queries: `decode` splits the keys of all such rows into tasks of near equal size,
    sized on the device from the contexts; `combine` joins a row's tasks in order. Longer rows: `prefill`, a tile of
    queries a program. Programs without work end at once. Sequences must stand in the step in order and without gaps,
    as `prepare` puts them. Tokens of no sequence, behind the last, become zero.
    """

    op, name = "attention", "ragged"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if why := gpu.refusal(site, device, (0, 1), 80):
            return why
        formats = {str(t.format) for t in (*site.inputs[:2], *site.outputs)}
        if len(formats) > 1:
            return f"queries, cache and result must share one format, not {sorted(formats)}"
        shape = Shape.of(site)
        if shape.block_size < 16 or shape.block_size & (shape.block_size - 1):
            return f"blocks of {shape.block_size} tokens; a power of two from 16 is needed"
        if shape.head_size > 256:
            return f"heads of {shape.head_size} numbers; at most 256"
        if shape.group > MAX_GROUP:
            return f"{shape.group} query heads for each KV head; at most {MAX_GROUP}"
        if next_power_of_2(shape.group) * shape.padded_size > MAX_COMBINED:
            return f"{shape.group} query heads of {shape.head_size} for each KV head; at most {MAX_COMBINED} numbers"
        if sizes["S"] > MAX_SEQUENCES:
            return f"{sizes['S']} sequences; at most {MAX_SEQUENCES}"
        return None

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        """BN: keys of a decode tile; TASKS: decode tasks aimed at for each multiprocessor; PM, PN: rows and keys of a
        prefill tile."""
        shape = Shape.of(site)
        if shape.bytes == 4:
            return _plain_configs(shape)
        decode = _decode_configs(shape)
        if sizes["T"] <= shape.short:
            return tuple({**d, **_prefill_configs(shape)[0]} for d in decode)
        prefill = _prefill_configs(shape)
        few = max(len(decode), len(prefill))
        return tuple({**decode[i % len(decode)], **prefill[i % len(prefill)]} for i in range(few))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        shape = Shape.of(site)
        programs = _programs(shape, sizes, device, config)
        tasks = programs + min(sizes["S"], sizes["T"])
        rows = tasks * shape.kv_heads * shape.decode_rows
        partial = cdiv(rows * shape.head_size * 4, 256) * 256
        steps = [_decode(site, sizes, device, config, programs, tasks, partial)]
        if sizes["T"] > shape.short:
            steps.append(_prefill(site, sizes, device, config))
        steps.append(_combine(site, sizes, device, config, programs, partial))
        return Draft(tuple(steps), partial + rows * 2 * 4)


def _programs(shape: Shape, sizes: Sizes, device: Device, config: Config) -> int:
    """Tasks to aim at for each KV head: what keeps the device busy, and no more than there can be tiles of keys."""
    aim = cdiv(max(device.multiprocessors, 1) * config["TASKS"], shape.kv_heads)
    tiles = min(sizes["S"], sizes["T"]) * cdiv(sizes["M"] * shape.block_size, config["BN"])
    return max(1, min(aim, tiles))


def _decode_configs(shape: Shape) -> tuple[dict[str, int], ...]:
    """A program holds about 64 KiB in flight (three stages of keys and values), so that two or three share an SM."""
    wide = {"BN": 128 if shape.padded_size <= 64 else 64 if shape.padded_size <= 128 else 32, "STAGES": 3}
    wide["WARPS"] = 8 if shape.decode_rows > 32 else 4
    narrow = {**wide, "BN": wide["BN"] // 2, "STAGES": 4}
    return ({**wide, "TASKS": 4}, {**wide, "TASKS": 2}, {**narrow, "TASKS": 4}, {**wide, "TASKS": 8})


def _prefill_configs(shape: Shape) -> tuple[dict[str, int], ...]:
    if shape.padded_size > 128:
        big = {"PM": 128, "PN": 32, "PSTAGES": 2, "PWARPS": 8}
        return (big,)
    big = {"PM": 128, "PN": 64, "PSTAGES": 3, "PWARPS": 8}
    shallow = {**big, "PSTAGES": 2}
    if shape.group > 64:
        return (big, shallow)
    # 128 keys beside 128 numbers of a head would spill.
    wide = {**shallow, "PN": 128} if shape.padded_size <= 64 else shallow
    return (big, wide, {**big, "PM": 64, "PWARPS": 4}, shallow)


def _plain_configs(shape: Shape) -> tuple[Config, ...]:
    """float32 has no tensor cores here: small tiles, or registers spill."""
    rows = max(16, next_power_of_2(shape.group))
    keys = 32 if shape.padded_size <= 128 and rows <= 32 else 16
    warps = 8 if shape.padded_size * rows >= 2048 else 4
    decode = {"BN": keys, "STAGES": 2, "WARPS": warps, "TASKS": 4}
    return ({**decode, "PM": rows, "PN": keys, "PSTAGES": 2, "PWARPS": warps},)


def _constants(site: Site, sizes: Sizes, device: Device) -> dict[str, Any]:
    shape = Shape.of(site)
    pdl, able = gpu.pdl(device)
    return {
        "H": shape.heads,
        "K": shape.kv_heads,
        "D": shape.head_size,
        "DP": shape.padded_size,
        "SP": _scanned(sizes["S"]),
        "SHORT": shape.short,
        "WINDOW": int(site.attr("window", 0)),
        pdl: able,
    }


def _scanned(sequences: int) -> int:
    """Few different lengths, so that few kernels are compiled."""
    return next(n for n in (32, 128, 512, 4096) if n >= sequences)


def _scores(site: Site) -> dict[str, Any]:
    return {
        "B": Shape.of(site).block_size,
        "SCALE": float(site.attr("scale")),
        "SOFTCAP": float(site.attr("softcap", 0.0)),
    }


ROWS = (("query_start_ptr", "*i32"), ("query_len_ptr", "*i32"), ("context_len_ptr", "*i32"))


def _decode(
    site: Site, sizes: Sizes, device: Device, config: Config, programs: int, tasks: int, partial: int
) -> KernelUse:
    shape = Shape.of(site)
    signature = (
        ("q_ptr", shape.pointer), ("kv_ptr", shape.pointer), *ROWS, ("table_ptr", "*i32"),
        ("out_ptr", shape.pointer), ("acc_ptr", "*fp32"), ("ml_ptr", "*fp32"),
        ("S", "i32"), ("M", "i32"), ("programs", "i32"),
    )  # fmt: skip
    constants = {**_constants(site, sizes, device), **_scores(site), "BM": shape.decode_rows, "BN": config["BN"]}
    kernel = _kernel("decode", signature, constants, config["WARPS"], config["STAGES"])
    numbers = gpu.integers(sizes["S"], sizes["M"], programs)
    args = (*inputs(*range(6)), *outputs(0), *gpu.workspace(0, partial), *numbers)
    return KernelUse(kernel, (tasks, shape.kv_heads, 1), args)


def _combine(site: Site, sizes: Sizes, device: Device, config: Config, programs: int, partial: int) -> KernelUse:
    shape = Shape.of(site)
    signature = (
        *ROWS, ("out_ptr", shape.pointer), ("acc_ptr", "*fp32"), ("ml_ptr", "*fp32"),
        ("T", "i32"), ("S", "i32"), ("programs", "i32"),
    )  # fmt: skip
    heads = next_power_of_2(shape.group)
    constants = {
        **_constants(site, sizes, device),
        "BM": shape.decode_rows,
        "BN": config["BN"],
        "GP": heads,
        "CP": max(1, 4096 // (heads * shape.padded_size)),
    }
    kernel = _kernel("combine", signature, constants, _combine_warps(heads * shape.padded_size), 1)
    numbers = gpu.integers(sizes["T"], sizes["S"], programs)
    args = (*inputs(2, 3, 4), *outputs(0), *gpu.workspace(0, partial), *numbers)
    grid = min(sizes["T"] * shape.kv_heads, COMBINE_PROGRAMS * max(device.multiprocessors, 1))
    return KernelUse(kernel, (grid, 1, 1), args)


def _combine_warps(numbers: int) -> int:
    return 4 if numbers <= 4096 else 8 if numbers <= 8192 else 16


def _prefill(site: Site, sizes: Sizes, device: Device, config: Config) -> KernelUse:
    shape = Shape.of(site)
    signature = (
        ("q_ptr", shape.pointer), ("kv_ptr", shape.pointer), *ROWS, ("table_ptr", "*i32"),
        ("out_ptr", shape.pointer), ("S", "i32"), ("M", "i32"),
    )  # fmt: skip
    constants = {**_constants(site, sizes, device), **_scores(site), "BM": config["PM"], "BN": config["PN"]}
    kernel = _kernel("prefill", signature, constants, config["PWARPS"], config["PSTAGES"])
    grid = (most_tiles(sizes, shape.short, config["PM"] // shape.group), shape.kv_heads, 1)
    return KernelUse(kernel, grid, (*inputs(*range(6)), *outputs(0), *gpu.integers(sizes["S"], sizes["M"])))


def most_tiles(sizes: Sizes, short: int, tile: int) -> int:
    """The most tiles of `tile` queries that rows of more than `short` queries can need.

    ceil(n / tile) <= (n - 1) / tile + 1, so R rows of T queries together need at most R + (T - R) / tile, which grows
    with R; and R is at most T / (short + 1).
    """
    rows = min(sizes["S"], sizes["T"] // (short + 1))
    return max(1, rows + (sizes["T"] - rows) // tile)


def _kernel(
    name: str, signature: tuple[tuple[str, str], ...], constants: dict[str, Any], warps: int, stages: int
) -> TritonKernel:
    return TritonKernel(f"{SOURCE}:{name}", signature, tuple(constants.items()), warps, stages)
