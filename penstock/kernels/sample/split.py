"""Sampling in two launches, the vocabulary split over programs: see the kernels for how."""

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
MOST = 1 << 19  # tokens of a vocabulary
GROUP, GROUPS = 16, 8192  # tokens in a group, which doubles where a row would have more groups than these
HELD, QUADS = 512, 1024  # times four tokens: what a row's program holds in registers, and what it reads at once beside
LOGITS = ("logits", "temperature", "top_k", "top_p", "min_p", "seed", "position")
PARTIAL = {"best": "*fp32", "where": "*i32", "peaks": "*fp32", "masses": "*fp32", "maxima": "*fp32", "lists": "*i32"}


class SplitSample(Tactic):
    """Rows may be greedy, sampled freely, or filtered by top_k, top_p and min_p, in any mixture."""

    op = "sample"
    name = "split"
    version = 3

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        vocabulary = site.inputs[0].shape[-1]
        if not isinstance(vocabulary, int) or vocabulary > MOST:
            return f"a vocabulary of {vocabulary} tokens; at most {MOST}"
        return gpu.refusal(site, device, (0,))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return tuple({"survey": s, "warps": w} for s, w in ((4, 16), (4, 8), (8, 16), (2, 16)))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        vocabulary, rows = gpu.width(site.inputs[0]), gpu.rows(site.inputs[0], sizes)
        lanes, size = 32 * config["survey"], group_size(vocabulary)
        chunks = cdiv(vocabulary, lanes * size)
        places, total = _places(rows, chunks, lanes)
        types = {name: gpu.pointer(t) for name, t in zip(LOGITS, site.inputs, strict=True)} | PARTIAL | {"out": "*i32"}
        shape = (("V", vocabulary), ("LANES", lanes), ("SIZE", size), ("NATIVE", True), gpu.pdl(device))
        whole = (("CHUNKS", chunks), ("PADDED", next_power_of_2(chunks)), ("HELD", HELD), ("QUADS", QUADS))

        def use(name: str, names: tuple[str, ...], constants: Constants, warps: int, *grid: int) -> KernelUse:
            signature = tuple((n, types[n]) for n in names)
            kernel = TritonKernel(f"{SOURCE}:{name}", signature, constants, warps)
            return KernelUse(kernel, (grid[0], grid[1], 1), tuple(places[n] for n in names))

        partial = tuple(PARTIAL)
        return Draft(
            (
                use("survey", (*LOGITS, *partial[:-1]), shape, config["survey"], chunks, rows),
                use("choose", (*LOGITS, *partial, "out"), (*whole, *shape), config["warps"], rows, 1),
            ),
            total,
        )


Constants = tuple[tuple[str, int | bool], ...]


def group_size(vocabulary: int, groups: int = GROUPS) -> int:
    """Tokens in a group, of which a row has at most so many."""
    return max(GROUP, next_power_of_2(cdiv(vocabulary, groups)))


def _places(rows: int, chunks: int, lanes: int) -> tuple[Mapping[str, Arg], int]:
    """Where everything lies, and the bytes of workspace: numbers of 4 bytes."""
    offsets, total = gpu.layout(*[4 * rows * chunks] * 4, *[4 * rows * chunks * lanes] * 2)
    operands = zip((*LOGITS, "out"), (*inputs(*range(len(LOGITS))), *outputs(0)), strict=True)
    return dict(chain(operands, zip(PARTIAL, gpu.workspace(*offsets), strict=True))), total
