"""Root-mean-square normalisation of rows or heads, with or without a residual sum before it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normal(x, w, inside, E: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [ROWS,BLOCK] normalised by row; zero outside of the row."""
    mean = tl.sum(x * x, 1) / E
    weight = tl.load(w, mask=inside, other=0.0).to(tl.float32) + OFFSET
    return x * tl.rsqrt(mean + EPS)[:, None] * weight


@triton.jit
def rms_norm(  # type: ignore[no-untyped-def]
    x,
    residual,
    w,
    y,
    total,
    rows,
    E: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """y [rows,E] = x / sqrt(mean(x^2) + EPS) * (w + OFFSET); or of total [rows,E] = x + residual, which is rounded
    before. Without a residual, it and `total` are None."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < E)
    numbers = tl.load(x + row * E + column, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        numbers += tl.load(residual + row * E + column, mask=inside, other=0.0).to(tl.float32)
        rounded = numbers.to(total.dtype.element_ty)
        tl.store(total + row * E + column, rounded, mask=inside)
        numbers = rounded.to(tl.float32)
    tl.store(y + row * E + column, _normal(numbers, w + column, column < E, E, EPS, OFFSET), mask=inside)
