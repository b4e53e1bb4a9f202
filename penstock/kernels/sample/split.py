"""Sampling in four launches, the vocabulary split over programs: see the kernels for how."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

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

SOURCE = "penstock.kernels.sample.split_triton"
LEVELS = 32  # as the kernels have it
CAPACITY = 8192  # candidates listed for a row; more are found again in the logits
BLOCK = 1024  # logits that a program reads at once
CENSUS = 256  # and where it compares each with every level
MOST = 1 << 20  # tokens of a vocabulary
LOGITS = ("logits", "temperature", "top_k", "top_p", "seed", "position")
TYPES = {
    **{"best": "*fp32", "where": "*i32", "counts": "*i32", "masses": "*fp32", "header": "*i32"},
    **{"whole_mass": "*fp32", "values": "*fp32", "tokens": "*i32"},
}


class SplitSample(Tactic):
    """Rows may be greedy, sampled freely, or filtered by top_k and top_p, in any mixture."""

    op = "sample"
    name = "split"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        vocabulary = site.inputs[0].shape[-1]
        if not isinstance(vocabulary, int) or vocabulary > MOST:
            return f"a vocabulary of {vocabulary} tokens; at most {MOST}"
        return gpu.refusal(site, device, (0,))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        most = next_power_of_2(cdiv(gpu.width(site.inputs[0]), BLOCK))
        first = _chunks(gpu.rows(site.inputs[0], sizes))
        shapes = ((min(c, most), w) for c, w in ((first, 8), (first, 16), (first * 2, 8), (first // 2, 8)))
        return tuple({"chunks": c, "warps": w} for c, w in dict.fromkeys(shapes))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        vocabulary, rows, chunks = gpu.width(site.inputs[0]), gpu.rows(site.inputs[0], sizes), config["chunks"]
        capacity = min(next_power_of_2(vocabulary), CAPACITY)
        chunk = cdiv(cdiv(vocabulary, chunks), BLOCK) * BLOCK
        places, total = _places(rows, chunks, capacity)
        types = {name: gpu.pointer(t) for name, t in zip(LOGITS, site.inputs, strict=True)} | TYPES | {"out": "*i32"}
        constants = {"V": vocabulary, "CAPACITY": capacity, "CHUNK": chunk, "CHUNKS": chunks, "BLOCK": BLOCK}

        def use(name: str, names: tuple[str, ...], grid: tuple[int, int, int], warps: int, **own: int) -> KernelUse:
            wanted = ("V", *_CONSTANTS[name], "CHUNKS", "BLOCK")
            mine = tuple((k, v) for k, v in (constants | own).items() if k in wanted)
            signature = tuple((n, types[n]) for n in names)
            kernel = TritonKernel(f"{SOURCE}:{name}", signature, (*mine, gpu.pdl(device)), warps)
            return KernelUse(kernel, grid, tuple(places[n] for n in names))

        split, whole = (rows, chunks, 1), (rows, 1, 1)
        return Draft(
            (
                use("survey", (*LOGITS, "best", "where"), split, 4),
                use("census", (*LOGITS[:4], "best", "counts", "masses"), split, 4, BLOCK=CENSUS),
                use("gather", (*LOGITS[:4], "best", *_FOUND[2:]), split, 4),
                use("choose", (*LOGITS, "best", "where", *_FOUND[4:], "out"), whole, config["warps"], BLOCK=2 * BLOCK),
            ),
            total,
        )


_FOUND = tuple(TYPES)
_CONSTANTS = {
    **{"survey": ("CHUNK",), "census": ("CHUNK",)},
    **{"gather": ("CAPACITY", "CHUNK"), "choose": ("CAPACITY",)},
}


def _chunks(rows: int) -> int:
    """Into how many chunks each row is split: enough to fill the device, few enough to sum up quickly."""
    return 64 if rows <= 8 else 16 if rows <= 64 else 4


def _places(rows: int, chunks: int, capacity: int) -> tuple[Mapping[str, Arg], int]:
    """Where everything lies, and the bytes of workspace: numbers of 4 bytes."""
    chunked, levels = 4 * rows * chunks, 4 * rows * chunks * LEVELS
    listed = 4 * rows * capacity
    offsets, total = gpu.layout(chunked, chunked, levels, levels, 8 * rows, 4 * rows, listed, listed)
    operands = zip((*LOGITS, "out"), (*inputs(*range(len(LOGITS))), *outputs(0)), strict=True)
    return dict(chain(operands, zip(TYPES, gpu.workspace(*offsets), strict=True))), total
