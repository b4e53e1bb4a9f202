"""rope_append and attention in one launch, for steps of few tokens.

Another program's writes to the pages are not visible within a launch. So the task whose tiles hold a key of the step
itself is the one that rotates it and writes it to the page, before it reads its tiles; no other task of a short row
reads there. Tokens of long rows are only rotated and appended here, for a launch behind.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.attention.attend_triton import over_pages
from penstock.kernels.attention.tasks_triton import find_task, finish
from penstock.kernels.rope_append.position_triton import rotation, rounded


@triton.jit
def _turned(
    source, partner, own, other, keep, w_ptr, kv_ptr,
    D: tl.constexpr, DP: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Heads at `source` [..,1], normalised if NORM and rotated; the factors and `keep` broadcast to [..,DP].

    Rounded for a cache of fewer bits, see `rounded`.
    """
    d = tl.arange(0, DP)
    x = tl.load(source + d, mask=keep, other=0.0).to(tl.float32)
    y = tl.load(source + partner, mask=keep, other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, -1, keep_dims=True) / D + EPS)
        x = x * inverse * (tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32) + OFFSET)
        y = y * inverse * (tl.load(w_ptr + partner, mask=d < D, other=0.0).to(tl.float32) + OFFSET)
        x, y = rounded(x, source, kv_ptr), rounded(y, source, kv_ptr)
    return rounded(x * own + y * other, source, kv_ptr)


@triton.jit
def step(
    qkv_ptr, kv_ptr, positions_ptr, freqs_ptr, rows_ptr, table_ptr, query_start_ptr, query_len_ptr, context_len_ptr,
    q_norm_ptr, k_norm_ptr, out_ptr, q_out_ptr, acc_ptr, ml_ptr, count_ptr,
    slopes_ptr, distances_ptr, sinks_ptr, T, S, M, programs, least, R: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, SP: tl.constexpr,
    SHORT: tl.constexpr, QP: tl.constexpr, BM: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, TT: tl.constexpr,
    HALF: tl.constexpr, PAIRS: tl.constexpr, BY_ROW: tl.constexpr, FACTOR: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One task of one short row, or TT tokens to look through, and one KV head. Grid: (tasks at most + T / TT, K).

    Before the wait, which is for qkv, only what `prepare` wrote is read: see `Draft` for why that is there by then.
    """
    task = tl.program_id(0)
    head = tl.program_id(1)
    G: tl.constexpr = H // K
    GP: tl.constexpr = BM // QP
    row, count, context, part, parts, begin, end = find_task(
        task, query_len_ptr, context_len_ptr, S, programs, least, SP, SHORT, BN, WINDOW
    )
    if row >= S and part * TT >= T:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        return
    if row >= S:
        _look_through(
            qkv_ptr, kv_ptr, positions_ptr, freqs_ptr, rows_ptr, table_ptr, query_len_ptr, q_norm_ptr, k_norm_ptr,
            out_ptr, q_out_ptr, part * TT, head, T, M,
            H, K, D, DP, B, SHORT, TT, HALF, PAIRS, BY_ROW, FACTOR, NORM, EPS, OFFSET, PDL,
        )  # fmt: skip
        return
    token = tl.load(query_start_ptr + row, cache_modifier=".cg").to(tl.int64)
    table = table_ptr + row.to(tl.int64) * M
    past = context - count
    d = tl.arange(0, DP)
    query = tl.arange(0, QP)
    partner, own, other = rotation(freqs_ptr, (past + query)[:, None], row, DP, HALF, PAIRS, BY_ROW, FACTOR)
    # Where the step's own tokens go; each is this task's if its key is among the task's tiles.
    position = past + query
    fresh = (query < count) & (position >= begin * BN) & (position < end * BN)
    block = tl.load(table + position // B, mask=fresh, other=0, cache_modifier=".cg").to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    g = tl.arange(0, GP)
    WIDTH: tl.constexpr = (H + 2 * K) * D
    keep = ((query < count)[:, None] & (g < G)[None, :])[:, :, None] & (d < D)[None, None, :]
    qkv = qkv_ptr + ((token + query) * WIDTH)[:, None]
    source = qkv[:, :, None] + ((head * G + g) * D)[None, :, None]
    q = _turned(source, partner, own[:, None, :], other[:, None, :], keep, q_norm_ptr, kv_ptr, D, DP, NORM, EPS, OFFSET)
    q = tl.reshape(q, (BM, DP)).to(qkv_ptr.dtype.element_ty)
    keep = fresh[:, None] & (d < D)[None, :]
    k = _turned(qkv + (H + head) * D, partner, own, other, keep, k_norm_ptr, kv_ptr, D, DP, NORM, EPS, OFFSET)
    v = tl.load(qkv + (H + K + head) * D + d[None, :], mask=keep, other=0.0)
    place = ((block * (2 * K) + head) * B + position % B)[:, None] * D + d[None, :]
    tl.store(kv_ptr + place, k.to(kv_ptr.dtype.element_ty), mask=keep)
    tl.store(kv_ptr + K * B * D + place, v.to(kv_ptr.dtype.element_ty), mask=keep)
    # From here on this program, and only this one, reads those pages' own keys.
    tl.debug_barrier()

    r = tl.arange(0, BM)
    at = past + tl.minimum(r // GP, count - 1)
    low = context - context
    if WINDOW > 0:
        low = tl.maximum(past - WINDOW + 1, 0)
    m, total, acc = over_pages(
        q, kv_ptr, table, begin, end, low, context, at, head, part,
        head * G + tl.minimum(r % GP, G - 1), slopes_ptr, distances_ptr, sinks_ptr, R,
        K, D, DP, B, BM, W, BN, SCALE, SOFTCAP, WINDOW, NATIVE,
    )  # fmt: skip
    live = (r < count * GP) & (r % GP < G)
    start = ((token + r // GP) * H + head * G + r % GP) * D
    finish(
        m, total, acc, out_ptr, acc_ptr, ml_ptr, count_ptr, start, live, task, part, parts, row, head,
        K, D, DP, DP, BM,
    )  # fmt: skip


@triton.jit
def _look_through(
    qkv_ptr, kv_ptr, positions_ptr, freqs_ptr, rows_ptr, table_ptr, query_len_ptr, q_norm_ptr, k_norm_ptr,
    out_ptr, q_out_ptr, first, head, T, M,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, SHORT: tl.constexpr,
    TT: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, BY_ROW: tl.constexpr, FACTOR: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of TT tokens from `first` on, one KV head's share: zero padding; rotate and append those of long rows."""
    G: tl.constexpr = H // K
    t = first + tl.arange(0, TT)
    d = tl.arange(0, DP)
    inside = (d < D)[None, :]
    row = tl.load(rows_ptr + t, mask=t < T, other=0, cache_modifier=".cg")
    padding = (t < T) & (row < 0)
    queries = tl.load(query_len_ptr + row, mask=(t < T) & (row >= 0), other=0, cache_modifier=".cg")
    long = queries > SHORT
    position = tl.load(positions_ptr + t, mask=long, other=0, cache_modifier=".cg")
    block = tl.load(table_ptr + row.to(tl.int64) * M + position // B, mask=long, other=0, cache_modifier=".cg")
    partner, own, other = rotation(freqs_ptr, position[:, None], row[:, None], DP, HALF, PAIRS, BY_ROW, FACTOR)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = t.to(tl.int64)
    if tl.max(padding.to(tl.int32), 0) > 0:
        for g in range(0, G):
            place = (token * H + head * G + g)[:, None] * D + d[None, :]
            zero = tl.zeros((TT, DP), out_ptr.dtype.element_ty)
            tl.store(out_ptr + place, zero, mask=padding[:, None] & inside)
    if tl.max(long.to(tl.int32), 0) > 0:
        keep = long[:, None] & inside
        qkv = qkv_ptr + (token * ((H + 2 * K) * D))[:, None]
        for g in range(0, G):
            source = qkv + (head * G + g) * D
            q = _turned(source, partner, own, other, keep, q_norm_ptr, kv_ptr, D, DP, NORM, EPS, OFFSET)
            place = (token * H + head * G + g)[:, None] * D + d[None, :]
            tl.store(q_out_ptr + place, q.to(q_out_ptr.dtype.element_ty), mask=keep)
        k = _turned(qkv + (H + head) * D, partner, own, other, keep, k_norm_ptr, kv_ptr, D, DP, NORM, EPS, OFFSET)
        v = tl.load(qkv + (H + K + head) * D + d[None, :], mask=keep, other=0.0)
        place = ((block.to(tl.int64) * (2 * K) + head) * B + position % B)[:, None] * D + d[None, :]
        tl.store(kv_ptr + place, k.to(kv_ptr.dtype.element_ty), mask=keep)
        tl.store(kv_ptr + K * B * D + place, v.to(kv_ptr.dtype.element_ty), mask=keep)
