"""Copying groups of columns into tensors of their own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split(  # type: ignore[no-untyped-def]
    x,
    y0,
    y1,
    y2,
    WIDTH: tl.constexpr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first N0 columns of each row of x to y0, the next N1 to y1, the next N2 to y2; program (row, block)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    numbers = tl.load(x + row * WIDTH + column, mask=column < N0 + N1 + N2)
    tl.store(y0 + row * N0 + column, numbers, mask=column < N0)
    if N1 > 0:
        tl.store(y1 + row * N1 + column - N0, numbers, mask=(column >= N0) & (column < N0 + N1))
    if N2 > 0:
        tl.store(y2 + row * N2 + column - N0 - N1, numbers, mask=(column >= N0 + N1) & (column < N0 + N1 + N2))
