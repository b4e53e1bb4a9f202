"""The gated delta rule, one token after another: some columns of one head's memory of one sequence a program."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.causal_conv.by_slot_triton import clear_behind
from penstock.kernels.selective_scan.by_token_triton import softplus


@triton.jit
def _token(x, steps, head, group, i, of_key, column, inside, K, V, H, G):
    """A token's query, key, some of its value, and the raw numbers of its step."""
    q = tl.load(x + group * K + i, mask=of_key, other=0.0).to(tl.float32)
    k = tl.load(x + (G + group) * K + i, mask=of_key, other=0.0).to(tl.float32)
    v = tl.load(x + 2 * G * K + head * V + column, mask=inside, other=0.0).to(tl.float32)
    return q, k, v, tl.load(steps + head).to(tl.float32), tl.load(steps + H + head).to(tl.float32)


@triton.jit
def delta_scan(
    state_ptr, x_ptr, steps_ptr, decay_ptr, dt_bias_ptr,
    query_start_ptr, query_len_ptr, context_len_ptr, slot_ptr, y_ptr, T, S,
    H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr, G: tl.constexpr, SP: tl.constexpr,
    BLOCK: tl.constexpr, ROOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (S + 1, H, ceil(V / BLOCK)); programs of row S zero what lies behind the last sequence."""
    row, head = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < V
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if row == S:
        clear_behind(y_ptr, query_start_ptr, query_len_ptr, head * V + column, inside, T, S, H * V, SP)
        return
    count = tl.load(query_len_ptr + row)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    if (slot < 0) | (count == 0):
        return
    i = tl.arange(0, KP)
    group = head // (H // G)
    place = (slot * H + head) * (K * V) + i[:, None] * V + column[None, :]
    keep = (i < K)[:, None] & inside[None, :]
    s = tl.load(state_ptr + place, mask=keep & (count < tl.load(context_len_ptr + row)), other=0.0)
    rate = -tl.exp(tl.load(decay_ptr + head))
    shift = tl.load(dt_bias_ptr + head)
    start = tl.load(query_start_ptr + row).to(tl.int64)
    ROW: tl.constexpr = 2 * G * K + H * V
    x, steps, y = x_ptr + start * ROW, steps_ptr + start * (2 * H), y_ptr + start * (H * V) + head * V
    q, k, v, beta, raw = _token(x, steps, head, group, i, i < K, column, inside, K, V, H, G)
    for t in range(count):
        # The next token's are under way while this one's are used; behind the last its own are read again.
        ahead = tl.minimum(t + 1, count - 1).to(tl.int64)
        q1, k1, v1, beta1, raw1 = _token(
            x + ahead * ROW, steps + ahead * (2 * H), head, group, i, i < K, column, inside, K, V, H, G
        )
        k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        q = q * (tl.rsqrt(tl.sum(q * q, 0) + 1e-6) / ROOT)
        s = tl.exp(rate * softplus(raw + shift)) * s
        missing = tl.sigmoid(beta) * (v - tl.sum(s * k[:, None], 0))
        s += k[:, None] * missing[None, :]
        tl.store(y + column, tl.sum(s * q[:, None], 0).to(y_ptr.dtype.element_ty), mask=inside)
        y += H * V
        q, k, v, beta, raw = q1, k1, v1, beta1, raw1
    tl.store(state_ptr + place, s, mask=keep)
