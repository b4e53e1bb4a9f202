"""The convolution of all tokens of a sequence, a block of channels a program, and what kernels by slot share."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.activation_triton import activate


@triton.jit
def clear_behind(y_ptr, query_start_ptr, query_len_ptr, column, inside, T, S, WIDTH: tl.constexpr, SP: tl.constexpr):
    """Zero these columns of y [T,WIDTH] in the tokens behind the last sequence."""
    i = tl.arange(0, SP)
    starts = tl.load(query_start_ptr + i, mask=i < S, other=0)
    lengths = tl.load(query_len_ptr + i, mask=i < S, other=0)
    zero = tl.zeros(column.shape, y_ptr.dtype.element_ty)
    covered = tl.max(tl.where(lengths > 0, starts + lengths, 0), 0)
    for i in range(0, T - covered):
        tl.store(y_ptr + (covered + i).to(tl.int64) * WIDTH + column, zero, mask=inside)


@triton.jit
def causal_conv(
    state_ptr, x_ptr, w_ptr, bias_ptr, query_start_ptr, query_len_ptr, context_len_ptr, slot_ptr, y_ptr, T, S,
    C: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, SP: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    ACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (S + 1, ceil(C / BLOCK)); programs of row S zero what lies behind the last sequence."""
    row = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < C
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if row == S:
        clear_behind(y_ptr, query_start_ptr, query_len_ptr, channel, inside, T, S, C, SP)
        return
    count = tl.load(query_len_ptr + row)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    if (slot < 0) | (count == 0):
        return
    kept = count < tl.load(context_len_ptr + row)  # what the slot holds is of this text
    x = x_ptr + tl.load(query_start_ptr + row).to(tl.int64) * C
    y = y_ptr + tl.load(query_start_ptr + row).to(tl.int64) * C
    state = state_ptr + slot * (C * (W - 1))
    bias = tl.zeros((BLOCK,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    for first in range(0, count, TOKENS):
        t = first + tl.arange(0, TOKENS)
        total = tl.zeros((TOKENS, BLOCK), tl.float32)
        for i in tl.static_range(W):
            at = t - (W - 1) + i
            value = _input(x, state, at, channel, inside, kept, count, C, W)
            total += value * tl.load(w_ptr + channel * W + i, mask=inside, other=0.0).to(tl.float32)[None, :]
        place = t.to(tl.int64)[:, None] * C + channel[None, :]
        tl.store(y + place, activate(total + bias[None, :], ACT), mask=(t < count)[:, None] & inside[None, :])
    k = tl.arange(0, WP)
    last = _input(x, state, count - (W - 1) + k, channel, inside, kept, count, C, W)
    tl.debug_barrier()  # all have read what the slot held
    place = channel[None, :] * (W - 1) + k[:, None]
    tl.store(state + place, last.to(state_ptr.dtype.element_ty), mask=(k < W - 1)[:, None] & inside[None, :])


@triton.jit
def _input(x, state, at, channel, inside, kept, count, C: tl.constexpr, W: tl.constexpr):
    """Inputs number `at` of this step, [n,BLOCK] in float32; those below 0 are the slot's, or zero."""
    own = (at >= 0) & (at < count)
    value = tl.load(x + at.to(tl.int64)[:, None] * C + channel[None, :], mask=own[:, None] & inside[None, :], other=0.0)
    before = (at < 0) & (at >= 1 - W) & kept
    place = channel[None, :] * (W - 1) + at[:, None] + (W - 1)
    return (value + tl.load(state + place, mask=before[:, None] & inside[None, :], other=0.0)).to(tl.float32)
