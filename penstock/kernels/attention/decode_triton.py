"""Attention of rows of a few queries, split over their keys, for any mixture of contexts."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.attention.attend_triton import over_pages
from penstock.kernels.attention.tasks_triton import find_task, finish


@triton.jit
def decode(
    q_ptr, kv_ptr, query_start_ptr, query_len_ptr, context_len_ptr, table_ptr, out_ptr, acc_ptr, ml_ptr, count_ptr,
    slopes_ptr, distances_ptr, sinks_ptr, T, S, M, programs, least, R: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, SP: tl.constexpr,
    SHORT: tl.constexpr, BM: tl.constexpr, W: tl.constexpr, BN: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One task of one short row and one KV head. Grid: (more than programs + rows, K).

    Programs beyond the last task, of which there is at least one, zero the tokens behind the last sequence. Before
    the wait only what `prepare` wrote is read: see `Draft` for why that is there by then.
    """
    G: tl.constexpr = H // K
    task = tl.program_id(0)
    head = tl.program_id(1)
    row, count, context, part, parts, begin, end = find_task(
        task, query_len_ptr, context_len_ptr, S, programs, least, SP, SHORT, BN, WINDOW
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    d = tl.arange(0, DP)
    r = tl.arange(0, BM)
    if row >= S:
        idle = tl.num_programs(0) - (task - part)
        _clear(out_ptr, query_start_ptr, query_len_ptr, part, idle, head, T, S, H, K, D, DP, SP, BM)
        return
    token = tl.load(query_start_ptr + row).to(tl.int64)
    live = r < count * G
    at = context - count + tl.minimum(r // G, count - 1)
    keep = live[:, None] & (d < D)[None, :]
    start = ((token + r // G) * H + head * G + r % G) * D
    q = tl.load(q_ptr + start[:, None] + d[None, :], mask=keep, other=0.0)
    low = context - context
    if WINDOW > 0:
        low = tl.maximum(context - count - WINDOW + 1, 0)
    table = table_ptr + row.to(tl.int64) * M
    m, total, acc = over_pages(
        q, kv_ptr, table, begin, end, low, context, at, head, part,
        head * G + r % G, slopes_ptr, distances_ptr, sinks_ptr, R,
        K, D, DP, B, BM, W, BN, SCALE, SOFTCAP, WINDOW, NATIVE,
    )  # fmt: skip
    if kv_ptr.dtype.element_ty == tl.float8e4nv:
        # Read again: what is not held over the loop leaves its registers to it.
        token = tl.load(query_start_ptr + row, cache_modifier=".cg").to(tl.int64)
        start = ((token + r // G) * H + head * G + r % G) * D
    finish(
        m, total, acc, out_ptr, acc_ptr, ml_ptr, count_ptr, start, live, task, part, parts, row, head,
        K, D, DP, DP, BM,
    )  # fmt: skip


@triton.jit
def _clear(
    out_ptr, query_start_ptr, query_len_ptr, index, programs, head, T, S,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Zero one KV head's share of the tokens behind the last sequence, the programs beyond the last task in turn."""
    G: tl.constexpr = H // K
    i = tl.arange(0, SP)
    starts = tl.load(query_start_ptr + i, mask=i < S, other=0)
    lengths = tl.load(query_len_ptr + i, mask=i < S, other=0)
    covered = tl.max(tl.where(lengths > 0, starts + lengths, 0), 0)
    r = tl.arange(0, BM)
    d = tl.arange(0, DP)
    keep = (r < G)[:, None] & (d < D)[None, :]
    for i in range(index, T - covered, programs):
        place = ((covered + i).to(tl.int64) * H + head * G + r)[:, None] * D + d[None, :]
        tl.store(out_ptr + place, tl.zeros((BM, DP), out_ptr.dtype.element_ty), mask=keep)
