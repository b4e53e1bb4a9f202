"""Experts of a few tokens: each chosen expert's weights are streamed past its token, in 16-byte pieces."""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.activation_triton import activate
from penstock.kernels.linear.gemv_triton import products


@triton.jit
def gated(gate, up, ACT: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):  # type: ignore[no-untyped-def]
    """What goes from the first product to the second."""
    if ACT == "swiglu_clamped":
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        y = gate * tl.sigmoid(ALPHA * gate) * (up + 1.0)
    else:
        y = activate(gate, ACT) * up
    return y


@triton.jit
def _streamed(start, x, scale, acc, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + scale * rows times x, unfinished: [ROWS,COLUMNS/LANE]. start: [ROWS,1] pointers to rows of K."""
    LANE: tl.constexpr = 128 // start.dtype.element_ty.primitive_bitwidth
    for k in tl.range(0, K, COLUMNS, num_stages=1):
        column = k + tl.arange(0, COLUMNS)
        if K % COLUMNS == 0:
            tile = tl.load(start + column[None, :], eviction_policy="evict_first")
        else:
            tile = tl.load(start + column[None, :], mask=column[None, :] < K, other=0.0, eviction_policy="evict_first")
        vector = tl.load(x + column, mask=column < K, other=0.0)
        acc += scale * products(tile.to(tl.float32), vector, ROWS, COLUMNS, LANE)
    return acc


@triton.jit
def enter(  # type: ignore[no-untyped-def]
    x,
    experts,
    w_in,
    b_in,
    h,
    E: tl.constexpr,
    F: tl.constexpr,
    CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACT: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[a] = gated(w_in[experts[a]] @ x[a // CHOSEN]). Program (a, i) owns gate and up rows of ROWS/2 features.

    Programs beside one another read the same rows of an expert, where their tokens share it.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    a = tl.program_id(0)
    expert = tl.load(experts + a).to(tl.int64)
    n = tl.minimum(tl.program_id(1) * ROWS + tl.arange(0, ROWS), 2 * F - 1)
    row = (n % 2) * F + n // 2
    start = w_in + (expert * (2 * F) + row)[:, None] * E
    acc = tl.zeros((ROWS, COLUMNS // (128 // w_in.dtype.element_ty.primitive_bitwidth)), tl.float32)
    sums = tl.sum(_streamed(start, x + (a // CHOSEN) * E, 1.0, acc, E, ROWS, COLUMNS), 1)
    if b_in is not None:
        sums += tl.load(b_in + expert * (2 * F) + row).to(tl.float32)
    gate, up = tl.split(tl.reshape(sums, (ROWS // 2, 2)))
    f = tl.program_id(1) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    tl.store(h + a.to(tl.int64) * F + f, gated(gate, up, ACT, LIMIT, ALPHA), mask=f < F)


@triton.jit
def leave(  # type: ignore[no-untyped-def]
    h,
    experts,
    weights,
    w_out,
    b_out,
    y,
    E: tl.constexpr,
    F: tl.constexpr,
    CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[t] = the sum over its experts, in their order, of weight * (w_out @ h + b_out). Program (t, i): ROWS rows."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(n, E - 1)
    acc = tl.zeros((ROWS, COLUMNS // (128 // w_out.dtype.element_ty.primitive_bitwidth)), tl.float32)
    offset = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(CHOSEN):
        a = t * CHOSEN + i
        expert, weight = tl.load(experts + a).to(tl.int64), tl.load(weights + a)
        start = w_out + (expert * E + row)[:, None] * F
        acc = _streamed(start, h + a.to(tl.int64) * F, weight, acc, F, ROWS, COLUMNS)
        if b_out is not None:
            offset += weight * tl.load(b_out + expert * E + row).to(tl.float32)
    tl.store(y + t.to(tl.int64) * E + n, tl.sum(acc, 1) + offset, mask=n < E)
