"""A state space, one token after another: a part of one head of one sequence a program."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.causal_conv.by_slot_triton import clear_behind


@triton.jit
def softplus(x):
    """log(1 + exp(x)), by its series where exp(x) is small: a float32 sum would lose it."""
    e = tl.exp(tl.minimum(x, 20.0))
    small = e * (1.0 - e * (0.5 - e * (1.0 / 3 - e * 0.25)))
    return tl.where(x > 20.0, x, tl.where(e < 0.01, small, tl.log(1.0 + e)))


@triton.jit
def _token(x, dt, head, part, inside, group, width, of_state, P, W, H, G):
    """What a token brings: its part of a head, what it is written and read by, and the raw step."""
    inputs = tl.load(x + head * P + part, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + H * P + group * W + width, mask=of_state, other=0.0).to(tl.float32)
    c = tl.load(x + H * P + (G + group) * W + width, mask=of_state, other=0.0).to(tl.float32)
    return inputs, b, c, tl.load(dt + head).to(tl.float32)


@triton.jit
def selective_scan(
    state_ptr, x_ptr, dt_ptr, decay_ptr, dt_bias_ptr, skip_ptr,
    query_start_ptr, query_len_ptr, context_len_ptr, slot_ptr, y_ptr, T, S,
    H: tl.constexpr, P: tl.constexpr, W: tl.constexpr, WP: tl.constexpr, G: tl.constexpr, SP: tl.constexpr,
    BLOCK: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (S + 1, H, ceil(P / BLOCK)); programs of row S zero what lies behind the last sequence."""
    row, head = tl.program_id(0), tl.program_id(1)
    part = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = part < P
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if row == S:
        clear_behind(y_ptr, query_start_ptr, query_len_ptr, head * P + part, inside, T, S, H * P, SP)
        return
    count = tl.load(query_len_ptr + row)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    if (slot < 0) | (count == 0):
        return
    width = tl.arange(0, WP)
    group = head // (H // G)
    place = (slot * H + head) * (P * W) + part[:, None] * W + width[None, :]
    keep = inside[:, None] & (width < W)[None, :]
    s = tl.load(state_ptr + place, mask=keep & (count < tl.load(context_len_ptr + row)), other=0.0)
    rate = -tl.exp(tl.load(decay_ptr + head))
    shift, skip = tl.load(dt_bias_ptr + head), tl.load(skip_ptr + head)
    start = tl.load(query_start_ptr + row).to(tl.int64)
    ROW: tl.constexpr = H * P + 2 * G * W
    x, dt, y = x_ptr + start * ROW, dt_ptr + start * H, y_ptr + start * (H * P) + head * P
    inputs, b, c, raw = _token(x, dt, head, part, inside, group, width, width < W, P, W, H, G)
    for t in range(count):
        # The next token's are under way while this one's are used; behind the last its own are read again.
        ahead = tl.minimum(t + 1, count - 1).to(tl.int64)
        more, b1, c1, raw1 = _token(
            x + ahead * ROW, dt + ahead * H, head, part, inside, group, width, width < W, P, W, H, G
        )
        step = tl.maximum(softplus(raw + shift), LEAST)
        if MOST > 0:
            step = tl.minimum(step, MOST)
        s = tl.exp(rate * step) * s + (step * inputs)[:, None] * b[None, :]
        out = tl.sum(s * c[None, :], 1) + skip * inputs
        tl.store(y + part, out.to(y_ptr.dtype.element_ty), mask=inside)
        y += H * P
        inputs, b, c, raw = more, b1, c1, raw1
    tl.store(state_ptr + place, s, mask=keep)
