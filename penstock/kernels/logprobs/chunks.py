"""Log-probabilities in two launches, the vocabulary split over programs: see the kernels for how."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.ir.ops.control import MOST_LOGPROBS
from penstock.kernels import gpu
from penstock.kernels.adjust.slices import places, unfit
from penstock.kernels.prepare.step import slot_layout
from penstock.kernels.sample.split import group_size
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

SOURCE = "penstock.kernels.logprobs.chunks_triton"
GROUPS = 16384  # of a row, whose keys a program holds in registers


class ChunkedLogprobs(Tactic):
    """Rows that ask nothing end at once; the first launch does the same for any number of best tokens."""

    op = "logprobs"
    name = "chunks"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return unfit(site, device, (0, 1))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return tuple({"survey": s, "warps": w} for s, w in ((4, 16), (4, 8), (8, 16)))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        vocabulary, rows = gpu.width(site.inputs[0]), gpu.rows(site.inputs[0], sizes)
        lanes, size = 32 * config["survey"], group_size(vocabulary, GROUPS)
        chunks = cdiv(vocabulary, lanes * size)
        offsets, total = gpu.layout(*[4 * rows * chunks] * 2, 8 * rows * chunks * lanes)
        names = ("logits", "adjusted", "sampled", "slots", "logit_slots", "sample_position")
        given = tuple(zip(names, map(gpu.pointer, site.inputs), strict=True))
        partial = (("peaks", "*fp32"), ("masses", "*fp32"), ("keys", "*i64"))
        results = (("top_ids", "*i32"), ("top_values", "*fp32"), ("chosen", "*fp32"))
        shape = (
            *(("V", vocabulary), *places(slot_layout(site))),
            *(("LANES", lanes), ("SIZE", size), ("MOST", MOST_LOGPROBS), gpu.pdl(device)),
        )
        whole = (("CHUNKS", chunks), ("PADDED", next_power_of_2(chunks)))
        survey = TritonKernel(f"{SOURCE}:survey", (*given, *partial), shape, config["survey"])
        merge = TritonKernel(f"{SOURCE}:merge", (*given, *partial, *results), (*shape, *whole), config["warps"])
        args = (*inputs(*range(len(names))), *gpu.workspace(*offsets))
        uses = (KernelUse(survey, (chunks, rows, 1), args), KernelUse(merge, (rows, 1, 1), (*args, *outputs(0, 1, 2))))
        return Draft(uses, total)
