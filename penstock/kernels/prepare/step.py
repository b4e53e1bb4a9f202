"""Expanding the step's upload in two launches: the writes to the slots, then everything that is read from them."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Site, Sizes
from penstock.ir.ops.state import ALWAYS, FIELDS, SlotLayout, prepared, table_name
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

SOURCE = "penstock.kernels.prepare.step_triton"
MOST_ROWS = 1024  # rows of a step that one program holds in registers
WRITERS = 32  # programs that share the upload's writes
MOST_TABLES = 4  # block tables that the kernel has arguments for
PAIRS = 8192  # (row, token) pairs that a program compares to find its tokens' rows

NAMES = (*ALWAYS[1:], "freqs", *map(table_name, range(1, MOST_TABLES)), "slot_of_row", "encoder_len")

assert FIELDS == ("length", "temperature", "top_k", "top_p", "min_p", "seed"), (
    "the kernels number the fields in this order"
)


def slot_layout(site: Site) -> SlotLayout:
    """Where the site's slots keep what."""
    return SlotLayout(**dict(site.attrs))  # type: ignore[arg-type]


def unfit(site: Site, sizes: Sizes, device: Device) -> str | None:
    """What keeps the step's kernels from this site."""
    rows, layout = max(sizes["S"], sizes["L"]), slot_layout(site)
    if rows > MOST_ROWS:
        return f"{rows} rows in a step; at most {MOST_ROWS}"
    if layout.size >= 1 << 31:
        return f"{layout.size} numbers in the slots; positions are 32-bit"
    return gpu.refusal(site, device)


class StepPrepare(Tactic):
    """Each program of the second launch counts tokens for itself, so that none waits for another."""

    op = "prepare"
    name = "step"

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if (tables := slot_layout(site).tables) > MOST_TABLES:
            return f"{tables} block tables in a step; at most {MOST_TABLES}"
        return unfit(site, sizes, device)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        return tuple({"warps": w} for w in (4, 8))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        return Draft((_write(device), _expand(site, sizes, device, config["warps"])))


def _write(device: Device) -> KernelUse:
    signature = (("slots", "*i32"), ("upload", "*i32"))
    kernel = TritonKernel(f"{SOURCE}:write", signature, (("BLOCK", 128), gpu.pdl(device)), 4)
    return KernelUse(kernel, (WRITERS, 1, 1), inputs(0, 1))


def _expand(site: Site, sizes: Sizes, device: Device, warps: int) -> KernelUse:
    layout, block_s = slot_layout(site), max(16, next_power_of_2(sizes["S"]))
    block_t = min(128, PAIRS // block_s)
    given = {name: index for index, name in enumerate(prepared(layout))}
    # Of what a site lacks any pointer does: it is not used.
    results = [given.get(name, 1) for name in NAMES]
    types = (*site.inputs, *(site.outputs[index] for index in results))
    pointers = zip(("slots", "upload", *NAMES), map(gpu.pointer, types), strict=True)
    kernel = TritonKernel(
        f"{SOURCE}:expand",
        (*pointers, ("T", "i32"), ("S", "i32"), ("L", "i32")),
        (
            *(("SLOTS", layout.num_slots), ("HISTORY", layout.history), ("M", layout.table), ("FREQS", layout.freqs)),
            *(("TABLES", layout.tables), ("SLOT_ROWS", layout.slot_rows), ("ENCODER", layout.encoder)),
            *(
                ("FREQS_AT", layout.freqs_at),
                ("ENCODER_AT", layout.encoder_at),
                ("TABLE_AT", layout.table_at),
                ("HISTORY_AT", layout.history_at),
            ),
            *(("BLOCK_T", block_t), ("BLOCK_S", block_s)),
            *(("BLOCK_M", min(1024, max(16, next_power_of_2(layout.table)))),),
            ("BLOCK_FREQS", max(16, next_power_of_2(layout.freqs))),
            gpu.pdl(device),
        ),
        warps,
    )
    args = (*inputs(0, 1), *outputs(*results), *gpu.integers(sizes["T"], sizes["S"], sizes["L"]))
    programs = 1 + sizes["S"] + cdiv(sizes["L"], block_t) + cdiv(sizes["T"], block_t)
    return KernelUse(kernel, (programs, 1, 1), args)
