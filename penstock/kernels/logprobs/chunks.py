"""Log-probabilities in two launches, the vocabulary split over programs: see the kernels for how."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.ir.ops.control import MOST_LOGPROBS
from penstock.kernels import gpu
from penstock.kernels.adjust.slices import places, unfit
from penstock.kernels.prepare.step import slot_layout
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
HELD = 2048  # candidates of a row for each four warps that merge them


class ChunkedLogprobs(Tactic):
    """Rows that ask nothing end at once; of the others each chunk finds as many of its best as the row asks for."""

    op = "logprobs"
    name = "chunks"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return unfit(site, device, (0, 1))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return tuple({"chunk": c, "warps": w} for c, w in ((2048, 4), (4096, 8), (4096, 4), (8192, 8)))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        vocabulary, rows = gpu.width(site.inputs[0]), gpu.rows(site.inputs[0], sizes)
        chunks = cdiv(vocabulary, config["chunk"])
        few, many = 4 * rows * chunks, 4 * rows * chunks * MOST_LOGPROBS
        offsets, total = gpu.layout(few, few, many, many)
        padded = next_power_of_2(chunks)
        partial = (("peaks", "*fp32"), ("masses", "*fp32"), ("values", "*fp32"), ("ids", "*i32"))
        names = ("logits", "adjusted", "sampled", "slots", "logit_slots", "sample_position")
        given = tuple(zip(names, map(gpu.pointer, site.inputs), strict=True))
        results = (("top_ids", "*i32"), ("top_values", "*fp32"), ("chosen", "*fp32"))
        shape = (("V", vocabulary), *places(slot_layout(site)), ("MOST", MOST_LOGPROBS), gpu.pdl(device))
        survey = TritonKernel(
            f"{SOURCE}:survey", (*given, *partial), (*shape, ("CHUNK", config["chunk"])), config["warps"]
        )
        merge = TritonKernel(
            f"{SOURCE}:merge",
            (*given, *partial, *results),
            (*shape, ("CHUNKS", chunks), ("PADDED", padded)),
            min(16, 4 * max(1, padded * MOST_LOGPROBS // HELD)),
        )
        args = (*inputs(*range(len(names))), *gpu.workspace(*offsets))
        uses = (KernelUse(survey, (chunks, rows, 1), args), KernelUse(merge, (rows, 1, 1), (*args, *outputs(0, 1, 2))))
        return Draft(uses, total)
