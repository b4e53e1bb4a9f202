"""Attention in which a query sees every key of its sequence: of the run's own rows, or of pages of an earlier run; or
all of its prefix, and what came before it.

A program has one head and a tile of queries of one sequence, and goes over all keys. Scores live in base 2.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(query_start_ptr, query_len_ptr, index, T, S, SP: tl.constexpr, QT: tl.constexpr):
    """(row, first query in it, token where the tile begins, its tokens); the row is -1 for tokens of no sequence."""
    i = tl.arange(0, SP)
    lengths = tl.load(query_len_ptr + i, mask=i < S, other=0)
    tiles = (lengths + QT - 1) // QT
    ends = tl.cumsum(tiles, 0)
    before = ends <= index
    row = tl.minimum(tl.sum(before.to(tl.int32)), S - 1)
    first = (index - tl.max(tl.where(before, ends, 0))) * QT
    start = tl.load(query_start_ptr + row) + first
    count = tl.minimum(tl.load(query_len_ptr + row) - first, QT)
    idle = index - tl.sum(tiles)
    if idle >= 0:
        row = -1
        start = tl.sum(lengths) + idle * QT
        count = tl.minimum(T - start, QT)
    return row, first, start, count


@triton.jit
def _fold(q, k, v, bias, seen, m, total, acc, SCALE: tl.constexpr):
    """Keys and values of which one at least is `seen` into the running softmax; `bias`: [QT,BN], or None."""
    score = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * (SCALE * LOG2E)
    if bias is not None:
        score += bias * LOG2E
    score = tl.where(seen[None, :], score, float("-inf"))
    highest = tl.maximum(m, tl.max(score, 1))
    fade = tl.exp2(m - highest)
    p = tl.exp2(score - highest[:, None])
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
    return highest, total, acc


@triton.jit
def over_rows(
    q_ptr, k_ptr, v_ptr, query_start_ptr, query_len_ptr, bias_ptr, out_ptr, T, S, R: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, QT: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles at most, H). `bias_ptr`: R numbers a head, of distances from -(R // 2) on, or None."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(1)
    row, first, start, count = _tile(query_start_ptr, query_len_ptr, tl.program_id(0), T, S, SP, QT)
    length = tl.load(query_len_ptr + row, mask=row >= 0, other=0)
    r, d = tl.arange(0, QT), tl.arange(0, DP)
    place = ((start + r).to(tl.int64) * H + head)[:, None] * D + d[None, :]
    mask = (r < count)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + place, mask=mask, other=0.0)
    m, total = tl.full((QT,), float("-inf"), tl.float32), tl.zeros((QT,), tl.float32)
    acc = tl.zeros((QT, DP), tl.float32)
    for begin in range(0, length, BN):
        n = begin + tl.arange(0, BN)
        seen = n < length
        keys = ((start - first + n).to(tl.int64) * H + head)[:, None] * D + d[None, :]
        keep = seen[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + keys, mask=keep, other=0.0)
        v = tl.load(v_ptr + keys, mask=keep, other=0.0)
        bias = bias_ptr
        if bias is not None:
            apart = tl.minimum(tl.maximum(n[None, :] - (first + r)[:, None], -(R // 2)), R // 2)
            bias = tl.load(bias_ptr + head * R + R // 2 + apart)
        m, total, acc = _fold(q, k, v, bias, seen, m, total, acc, SCALE)
    y = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile_over_pages(
    q_ptr, kv_ptr, table, out_ptr, start, count, length, own, head, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, B: tl.constexpr, QT: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """A tile of queries over the first `length` places of a table; of these query r sees own[r], or all if None."""
    r, d = tl.arange(0, QT), tl.arange(0, DP)
    place = ((start + r).to(tl.int64) * H + head)[:, None] * D + d[None, :]
    mask = (r < count)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + place, mask=mask, other=0.0)
    m, total = tl.full((QT,), float("-inf"), tl.float32), tl.zeros((QT,), tl.float32)
    acc = tl.zeros((QT, DP), tl.float32)
    for begin in range(0, length, BN):
        n = begin + tl.arange(0, BN)
        seen = n < length
        block = tl.load(table + n // B, mask=seen, other=0).to(tl.int64)
        keys = (block * (2 * K * B) + head // (H // K) * B + n % B)[:, None] * D + d[None, :]
        keep = seen[:, None] & (d < D)[None, :]
        k = tl.load(kv_ptr + keys, mask=keep, other=0.0)
        v = tl.load(kv_ptr + K * B * D + keys, mask=keep, other=0.0)
        hidden = own
        if hidden is not None:  # no row hides the first key
            hidden = tl.where(n[None, :] < own[:, None], 0.0, float("-inf"))
        m, total, acc = _fold(q, k, v, hidden, seen, m, total, acc, SCALE)
    y = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def over_pages(
    q_ptr, kv_ptr, query_start_ptr, query_len_ptr, encoder_len_ptr, table_ptr, out_ptr, T, S, M, H: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, SP: tl.constexpr, QT: tl.constexpr,
    BN: tl.constexpr, SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles at most, H). Each row sees the first `encoder_len` places of its table."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(1)
    row, _, start, count = _tile(query_start_ptr, query_len_ptr, tl.program_id(0), T, S, SP, QT)
    length = tl.load(encoder_len_ptr + row, mask=row >= 0, other=0)
    table = table_ptr + row.to(tl.int64) * M
    _tile_over_pages(
        q_ptr, kv_ptr, table, out_ptr, start, count, length, None, head, H, K, D, DP, B, QT, BN, SCALE
    )  # fmt: skip


@triton.jit
def over_prefix(
    q_ptr, kv_ptr, query_start_ptr, query_len_ptr, context_len_ptr, prefix_len_ptr, table_ptr, out_ptr, T, S, M,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, SP: tl.constexpr,
    QT: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `over_pages`, but a query sees the places up to its own, and all of the prefix."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(1)
    row, first, start, count = _tile(query_start_ptr, query_len_ptr, tl.program_id(0), T, S, SP, QT)
    context = tl.load(context_len_ptr + row, mask=row >= 0, other=0)
    prefix = tl.minimum(tl.load(prefix_len_ptr + row, mask=row >= 0, other=0), context)
    at = context - tl.load(query_len_ptr + row, mask=row >= 0, other=0) + first
    length = tl.where(row >= 0, tl.maximum(at + count, prefix), 0)
    own = tl.maximum(at + tl.arange(0, QT) + 1, prefix)
    table = table_ptr + row.to(tl.int64) * M
    _tile_over_pages(
        q_ptr, kv_ptr, table, out_ptr, start, count, length, own, head, H, K, D, DP, B, QT, BN, SCALE
    )  # fmt: skip
