"""Adjusting logits in one launch, the vocabulary split over programs: see the kernel for how."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.ir.ops.control import LISTS, NUMBERS
from penstock.ir.ops.state import SlotLayout
from penstock.kernels import gpu
from penstock.kernels.prepare.step import slot_layout
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, TritonKernel, cdiv, inputs, outputs

MOST = 1 << 19  # tokens of a vocabulary
LONGEST = 1 << 20  # a history: the kernel counts a token's occurrences in so many bits
BLOCK = 1024  # tokens of the history, or numbers of a list, that are read at once


def unfit(site: Site, device: Device, floats: tuple[int, ...]) -> str | None:
    """What keeps kernels that look at controls and histories from this site; `floats`: inputs that are logits."""
    vocabulary, layout = site.inputs[0].shape[-1], slot_layout(site)
    if not isinstance(vocabulary, int) or vocabulary > MOST:
        return f"a vocabulary of {vocabulary} tokens; at most {MOST}"
    if layout.history > LONGEST:
        return f"histories of {layout.history} tokens; at most {LONGEST}"
    if layout.size >= 1 << 31:
        return f"{layout.size} numbers in the slots; positions are 32-bit"
    return gpu.refusal(site, device, floats)


def places(layout: SlotLayout) -> tuple[tuple[str, int], ...]:
    """Constants: where the arena has controls and histories."""
    return (
        ("CONTROLS", layout.controls), ("CONTROLS_AT", layout.controls_at),
        ("HISTORY", layout.history), ("HISTORY_AT", layout.history_at),
    )  # fmt: skip


# The kernels, and those of `logprobs`, count on this order.
assert LISTS == 16 and NUMBERS == (
    "prompt_length", "least_length", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "no_repeat_ngram_size", "num_ends", "num_bias", "num_bad", "adjusts", "num_logprobs", "by_adjusted",
)  # fmt: skip


class SlicedAdjust(Tactic):
    """Rows that ask nothing are copied; of the others each program reads the whole history."""

    op = "adjust"
    name = "slices"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        return unfit(site, device, (0,))

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return tuple({"slice": s, "warps": w} for s, w in ((4096, 8), (2048, 8), (2048, 4)))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        vocabulary, rows = gpu.width(site.inputs[0]), gpu.rows(site.inputs[0], sizes)
        names = ("logits", "slots", "logit_slots", "sample_position", "out")
        kernel = TritonKernel(
            "penstock.kernels.adjust.slices_triton:adjust",
            tuple(zip(names, map(gpu.pointer, (*site.inputs, *site.outputs)), strict=True)),
            (
                *(("V", vocabulary), *places(slot_layout(site))),
                *(("SLICE", config["slice"]), ("BLOCK", BLOCK), gpu.pdl(device)),
            ),
            config["warps"],
        )
        grid = (cdiv(vocabulary, config["slice"]), rows, 1)
        return Draft((KernelUse(kernel, grid, (*inputs(0, 1, 2, 3), *outputs(0))),))
