"""Attention of rows of many queries: a tile of queries a program, over all the keys that it sees."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.attention.attend_triton import attend, blocks_of
from penstock.kernels.attention.narrow_triton import widened


@triton.jit
def prefill(
    q_ptr, kv_ptr, query_start_ptr, query_len_ptr, context_len_ptr, table_ptr, out_ptr, S, M,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, SP: tl.constexpr,
    SHORT: tl.constexpr, PM: tl.constexpr, PN: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of long rows, and one KV head. Grid: (K times the tiles at most)."""
    index = tl.program_id(0) // K
    tiles, row, query = find_tile(index, query_len_ptr, S, SP, SHORT, PM // (H // K))
    if index < tiles:
        attend_queries(
            q_ptr, kv_ptr, query_start_ptr, query_len_ptr, context_len_ptr, table_ptr, out_ptr,
            row, query, tl.program_id(0) % K, M, H, K, D, DP, B, PM, PN, SCALE, SOFTCAP, WINDOW, PDL,
        )  # fmt: skip
    elif PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def find_tile(index, query_len_ptr, S, SP: tl.constexpr, SHORT: tl.constexpr, QT: tl.constexpr):
    """(tiles of QT queries in all long rows, the row of tile number `index`, its first query).

    Last tiles first: they see the most keys, and what starts last should be short.
    """
    i = tl.arange(0, SP)
    lengths = tl.load(query_len_ptr + i, mask=i < S, other=0, cache_modifier=".cg")
    tiles = tl.where(lengths > SHORT, (lengths + QT - 1) // QT, 0)
    ends = tl.cumsum(tiles, 0)
    count = tl.sum(tiles)
    at = tl.maximum(count - 1 - index, 0)
    before = ends <= at
    row = tl.minimum(tl.sum(before.to(tl.int32)), S - 1)
    return count, row, (at - tl.max(tl.where(before, ends, 0), 0)) * QT


@triton.jit
def attend_queries(
    q_ptr, kv_ptr, query_start_ptr, query_len_ptr, context_len_ptr, table_ptr, out_ptr, row, query, head, M,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, PM: tl.constexpr,
    PN: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """PM // G queries of a row, from `query` on, of one KV head; PN keys at a time.

    Before the wait only what `prepare` wrote is read: see `Draft` for why that is there by then.
    """
    G: tl.constexpr = H // K
    QT: tl.constexpr = PM // G
    count = tl.load(query_len_ptr + row, cache_modifier=".cg")
    context = tl.load(context_len_ptr + row, cache_modifier=".cg")
    token = tl.load(query_start_ptr + row, cache_modifier=".cg").to(tl.int64) + query
    r = tl.arange(0, PM)
    d = tl.arange(0, DP)
    queries = tl.minimum(count - query, QT)
    keep = (r < queries * G)[:, None] & (d < D)[None, :]
    place = ((token + r // G) * H + head * G + r % G)[:, None] * D + d[None, :]
    position = context - count + query
    at = position + tl.minimum(r // G, queries - 1)
    table = table_ptr + row.to(tl.int64) * M
    last = (position + queries - 1) // PN + 1
    low = position - position
    if WINDOW > 0:
        low = tl.maximum(position - WINDOW + 1, 0)
    middle = low // PN
    blocks = blocks_of(table, middle, low, context, B, PN)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    q, gain = widened(tl.load(q_ptr + place, mask=keep, other=0.0), kv_ptr)
    m = tl.full((PM,), float("-inf"), tl.float32)
    total = tl.zeros((PM,), tl.float32)
    acc = tl.zeros((PM, DP), tl.float32)
    if WINDOW == 0:
        middle = (position + 1) // PN
        for tile in range(0, middle):
            m, total, acc = attend(
                q, gain, m, total, acc, kv_ptr, blocks, tile, low, context, at, head,
                K, D, DP, B, PN, SCALE, SOFTCAP, WINDOW, False,
            )  # fmt: skip
            blocks = blocks_of(table, tile + 1, low, context, B, PN)
    for tile in range(middle, last):
        m, total, acc = attend(
            q, gain, m, total, acc, kv_ptr, blocks, tile, low, context, at, head,
            K, D, DP, B, PN, SCALE, SOFTCAP, WINDOW, True,
        )  # fmt: skip
        blocks = blocks_of(table, tile + 1, low, context, B, PN)
    tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=keep)
