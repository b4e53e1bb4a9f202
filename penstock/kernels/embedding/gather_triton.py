"""Copying rows that indices choose."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather(indices, table, y, E: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """y[row] = table[indices[row]], rows of E numbers; program (row, block of columns)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    chosen = tl.load(indices + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + row * E + column, tl.load(table + chosen * E + column, mask=column < E), mask=column < E)
