"""Attention of rows of many queries: a tile of queries a program, over all the keys that it sees, or a part of them."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.attention.attend_triton import at_index, attend, begun, blocks_of
from penstock.kernels.attention.narrow_triton import widened
from penstock.kernels.attention.tasks_triton import finish

JOIN_KEYS = tl.constexpr(64)  # attended to in the time that joining one part takes


@triton.jit
def prefill(
    q_ptr, kv_ptr, query_start_ptr, query_len_ptr, context_len_ptr, table_ptr, out_ptr, acc_ptr, ml_ptr, count_ptr,
    slopes_ptr, distances_ptr, sinks_ptr, S, M, programs, least, R: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DC: tl.constexpr, B: tl.constexpr,
    SP: tl.constexpr, SHORT: tl.constexpr, PM: tl.constexpr, PN: tl.constexpr, CUT: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One task of long rows, and one KV head. Grid: (K times the tasks at most). CUT: tiles may be cut over keys."""
    task, row, query, part, parts = find_part(
        tl.program_id(0) // K, query_len_ptr, context_len_ptr, S, programs, least,
        SP, SHORT, PM // (H // K), PN, CUT, WINDOW,
    )  # fmt: skip
    if task >= 0:
        attend_queries(
            q_ptr, kv_ptr, query_start_ptr, query_len_ptr, context_len_ptr, table_ptr, out_ptr,
            acc_ptr, ml_ptr, count_ptr, slopes_ptr, distances_ptr, sinks_ptr,
            row, query, task, part, parts, tl.program_id(0) % K, M, R,
            H, K, D, DP, DC, B, PM, PN, CUT, SCALE, SOFTCAP, WINDOW, PDL,
        )  # fmt: skip
    elif PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def find_part(
    index, query_len_ptr, context_len_ptr, S, programs, least,
    SP: tl.constexpr, SHORT: tl.constexpr, QT: tl.constexpr, PN: tl.constexpr, CUT: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Which tile of QT queries of which long row, and which part of its keys, the program is for.

    Where fewer tiles than `programs` leave the device empty, each row's are cut into as many parts as its share of the
    work allows: rounded down, so that all run at once, and none of less than `least` tiles of keys. That makes less
    than programs + tiles tasks. More parts are shorter, and take longer to join: `worth` has the least of both.
    Last tiles first: they see the most keys, and what starts last should be short.
    Returns (task, negative where there is none for the program; row, first query, part, parts).
    """
    i = tl.arange(0, SP)
    lengths = tl.load(query_len_ptr + i, mask=i < S, other=0, cache_modifier=".cg")
    tiles = tl.where(lengths > SHORT, (lengths + QT - 1) // QT, 0)
    count = tl.sum(tiles)
    tasks = count
    ends = tl.cumsum(tiles, 0)
    cuts = tl.full((SP,), 1, tl.int32)
    if CUT and count < programs:
        contexts = tl.load(context_len_ptr + i, mask=i < S, other=0, cache_modifier=".cg")
        first = contexts - contexts
        if WINDOW > 0:
            last = contexts - (lengths - (tl.maximum(tiles, 1) - 1) * QT)
            first = tl.maximum(last - WINDOW + 1, 0) // PN
        keys = (contexts + PN - 1) // PN - first
        work = tl.maximum(tl.sum(tiles * keys), 1)
        worth = tl.sqrt((tl.maximum(keys, 0) * PN // JOIN_KEYS).to(tl.float32)).to(tl.int32)
        cuts = tl.maximum(tl.minimum(tl.minimum(keys * programs // work, keys // least), worth), 1)
        tasks = tl.sum(tiles * cuts)
        ends = tl.cumsum(tiles * cuts, 0)
    task = tasks - 1 - index
    before = ends <= task
    row = tl.minimum(tl.sum(before.to(tl.int32)), S - 1)
    own = task - tl.max(tl.where(before, ends, 0), 0)
    part = count - count
    parts = part + 1
    if CUT and tasks > count:
        parts = at_index(cuts, row, SP)
        part = own % parts
        own = own // parts
    return task, row, own * QT, part, parts


@triton.jit
def attend_queries(
    q_ptr, kv_ptr, query_start_ptr, query_len_ptr, context_len_ptr, table_ptr, out_ptr, acc_ptr, ml_ptr, count_ptr,
    slopes_ptr, distances_ptr, sinks_ptr, row, query, task, part, parts, head, M, R: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DC: tl.constexpr, B: tl.constexpr,
    PM: tl.constexpr, PN: tl.constexpr, CUT: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """PM // G queries of a row, from `query` on, of one KV head; PN keys at a time, of part `part` of `parts`.

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
    live = r < queries * G
    start = ((token + r // G) * H + head * G + r % G) * D
    position = context - count + query
    at = position + tl.minimum(r // G, queries - 1)
    table = table_ptr + row.to(tl.int64) * M
    low = position - position
    if WINDOW > 0:
        low = tl.maximum(position - WINDOW + 1, 0)
    begin = low // PN
    end = (position + queries - 1) // PN + 1
    if CUT and parts > 1:
        length = end - begin
        end = begin + length * (part + 1) // parts
        begin += length * part // parts
    blocks = blocks_of(table, begin, low, context, B, PN)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    q = tl.load(q_ptr + start[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
    q, gain = widened(q, kv_ptr)
    slopes, distances = slopes_ptr, distances_ptr
    if slopes is not None:
        slopes = tl.load(slopes + head * G + r % G)[:, None]
    if distances is not None:
        distances += ((head * G + r % G) * R)[:, None]
    m, total = tl.full((PM,), float("-inf"), tl.float32), tl.zeros((PM,), tl.float32)
    m, total = begun(sinks_ptr, head * G + r % G, part == 0, m, total)
    acc = tl.zeros((PM, DP), tl.float32)
    middle = begin
    if WINDOW == 0:
        middle = (position + 1) // PN
        if CUT:
            middle = tl.maximum(tl.minimum(middle, end), begin)
        for tile in range(begin, middle):
            m, total, acc = attend(
                q, gain, m, total, acc, kv_ptr, blocks, tile, low, context, at, head, slopes, distances, R,
                K, D, DP, B, PN, SCALE, SOFTCAP, WINDOW, False,
            )  # fmt: skip
            blocks = blocks_of(table, tile + 1, low, context, B, PN)
    for tile in range(middle, end):
        m, total, acc = attend(
            q, gain, m, total, acc, kv_ptr, blocks, tile, low, context, at, head, slopes, distances, R,
            K, D, DP, B, PN, SCALE, SOFTCAP, WINDOW, True,
        )  # fmt: skip
        blocks = blocks_of(table, tile + 1, low, context, B, PN)
    if CUT:
        finish(
            m, total, acc, out_ptr, acc_ptr, ml_ptr, count_ptr, start, live, task, part, parts, task - part, head,
            K, D, DP, DC, PM,
        )  # fmt: skip
    else:
        y = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + start[:, None] + d[None, :], y, mask=live[:, None] & (d < D)[None, :])
