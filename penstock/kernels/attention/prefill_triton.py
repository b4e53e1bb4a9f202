"""Attention of rows of many queries: a tile of queries a program, over all the keys that it sees."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.attention.attend_triton import at_index, attend, blocks_of


@triton.jit
def prefill(
    q_ptr, kv_ptr, query_start_ptr, query_len_ptr, context_len_ptr, table_ptr, out_ptr, S, M,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, SP: tl.constexpr,
    SHORT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of BM // G queries of one long row, and one KV head. Grid: (tiles at most, K).

    Before the wait only what `prepare` wrote is read: see `Draft` for why that is there by then.
    """
    G: tl.constexpr = H // K
    QT: tl.constexpr = BM // G
    head = tl.program_id(1)
    i = tl.arange(0, SP)
    lengths = tl.load(query_len_ptr + i, mask=i < S, other=0)
    tiles = tl.where(lengths > SHORT, (lengths + QT - 1) // QT, 0)
    ends = tl.cumsum(tiles, 0)
    # Last tiles first: they see the most keys, and what starts last should be short.
    index = tl.sum(tiles) - 1 - tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if index < 0:
        return
    row = tl.sum((ends <= index).to(tl.int32))
    query = (index - (at_index(ends, row, SP) - at_index(tiles, row, SP))) * QT
    count = tl.load(query_len_ptr + row)
    context = tl.load(context_len_ptr + row)
    token = tl.load(query_start_ptr + row).to(tl.int64) + query

    r = tl.arange(0, BM)
    d = tl.arange(0, DP)
    queries = tl.minimum(count - query, QT)
    keep = (r < queries * G)[:, None] & (d < D)[None, :]
    place = ((token + r // G) * H + head * G + r % G)[:, None] * D + d[None, :]
    q = tl.load(q_ptr + place, mask=keep, other=0.0)
    position = context - count + query
    at = position + tl.minimum(r // G, queries - 1)
    table = table_ptr + row.to(tl.int64) * M
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    last = (position + queries - 1) // BN + 1
    low = position - position
    if WINDOW > 0:
        low = tl.maximum(position - WINDOW + 1, 0)
    blocks = blocks_of(table, low // BN, low, context, B, BN)
    middle = low // BN
    if WINDOW == 0:
        middle = (position + 1) // BN
        for tile in range(0, middle):
            m, total, acc = attend(
                q, m, total, acc, kv_ptr, blocks, tile, low, context, at, head,
                K, D, DP, B, BN, SCALE, SOFTCAP, WINDOW, False,
            )  # fmt: skip
            blocks = blocks_of(table, tile + 1, low, context, B, BN)
    for tile in range(middle, last):
        m, total, acc = attend(
            q, m, total, acc, kv_ptr, blocks, tile, low, context, at, head,
            K, D, DP, B, BN, SCALE, SOFTCAP, WINDOW, True,
        )  # fmt: skip
        blocks = blocks_of(table, tile + 1, low, context, B, BN)
    tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=keep)
