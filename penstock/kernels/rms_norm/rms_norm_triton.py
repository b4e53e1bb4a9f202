"""Normalisation of rows or heads, by their root mean square or about their mean, perhaps of a sum with a residual."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(  # type: ignore[no-untyped-def]
    x,
    residual,
    w,
    bias,
    y,
    total,
    rows,
    E: tl.constexpr,
    HEADS: tl.constexpr,
    CENTRED: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """y [rows,E] = x / sqrt(mean(x^2) + EPS) * (w + OFFSET) + bias; or of total [rows,E] = x + residual, which is
    rounded before. CENTRED: x less its mean. w is [E], or [HEADS,E] for rows in turn. Without a residual, it and
    `total` are None; bias may be."""
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
    if CENTRED:
        numbers = tl.where(inside, numbers - (tl.sum(numbers, 1) / E)[:, None], 0.0)
    mean = tl.sum(numbers * numbers, 1) / E
    own = w + column
    if HEADS > 1:
        own += row % HEADS * E
    weight = tl.load(own, mask=column < E, other=0.0).to(tl.float32) + OFFSET
    numbers = numbers * tl.rsqrt(mean + EPS)[:, None] * weight
    if bias is not None:
        numbers += tl.load(bias + column, mask=column < E, other=0.0).to(tl.float32)
    tl.store(y + row * E + column, numbers, mask=inside)
