"""Paged attention for any mixture of short rows (a few queries, split over their keys) and long ones (prompts).

Rows of a tile are (query, head of the KV head's group) pairs, so that a group's heads share what is loaded of the
cache. Scores live in base 2: exp(x) = exp2(x log2 e). One function, `_attend`, is the arithmetic of both kernels.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _share(
    query_len_ptr, context_len_ptr, S, programs, SP: tl.constexpr, SHORT: tl.constexpr, BN: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """How short rows are cut into tasks: the same answer in every program. Vectors over sequences.

    All tiles of keys of all short rows are divided by `programs`; a row gets as many tasks as its share of the whole,
    rounded up. So there are at most programs + rows tasks, however contexts differ.
    Returns (queries of short rows, tiles, first tile, tasks).
    """
    i = tl.arange(0, SP)
    queries = tl.load(query_len_ptr + i, mask=i < S, other=0)
    context = tl.load(context_len_ptr + i, mask=i < S, other=0)
    queries = tl.where(queries <= SHORT, queries, 0)
    first = tl.zeros((SP,), tl.int32)
    if WINDOW > 0:
        first = tl.maximum(context - queries - WINDOW + 1, 0) // BN
    tiles = tl.where(queries > 0, (context + BN - 1) // BN - first, 0)
    most = tl.maximum((tl.sum(tiles) + programs - 1) // programs, 1)
    return queries, tiles, first, (tiles + most - 1) // most


@triton.jit
def _at(vector, index, SP: tl.constexpr):
    """vector[index], of non-negative numbers."""
    return tl.sum(tl.where(tl.arange(0, SP) == index, vector, 0))


@triton.jit
def _blocks(table, tile, low, context, B: tl.constexpr, BN: tl.constexpr):
    """The block of tile `tile`, or that of each of its keys; 0 for what is not read.

    Loaded one turn of the loop before it is used: a load whose address is itself loaded in the same turn would cost
    the pipeline of keys and values a stage.
    """
    if BN <= B:
        blocks = tl.load(table + tile * BN // B, mask=tile * BN < context, other=0)
    else:
        n = tile * BN + tl.arange(0, BN)
        blocks = tl.load(table + n // B, mask=(n >= low) & (n < context), other=0)
    return blocks


@triton.jit
def _attend(
    q, m, total, acc, kv, blocks, tile, low, context, at, head,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, BN: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold tile `tile` of keys and values into the running softmax (m, total, acc) of the rows of q.

    `blocks` is what `_blocks` gave for the tile; `at` is each row's position; keys before `low` or from `context` on
    are not read. MASKED is False only where every row sees every key of the tile.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    n = tile * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    alive = (n >= low) & (n < context)
    if BN <= B:
        start = kv + blocks.to(tl.int64) * (2 * K * B * D) + (head * B + tile * BN % B) * D
        offset = tl.arange(0, BN)[:, None] * D + d[None, :]
    else:
        start = kv + head * (B * D)
        offset = (blocks.to(tl.int64) * (2 * K * B * D) + n % B * D)[:, None] + d[None, :]
    if MASKED or BN > B:
        # What lies outside may be anything, and 0 * NaN is NaN.
        keep = alive[:, None] & (d < D)[None, :]
        k = tl.load(start + offset, mask=keep, other=0.0)
        v = tl.load(start + K * B * D + offset, mask=keep, other=0.0)
    elif DP != D:
        keep = tl.broadcast_to((d < D)[None, :], (BN, DP))
        k = tl.load(start + offset, mask=keep, other=0.0)
        v = tl.load(start + K * B * D + offset, mask=keep, other=0.0)
    else:
        k = tl.load(start + offset)
        v = tl.load(start + K * B * D + offset)
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        score = SOFTCAP - 2 * SOFTCAP / (tl.exp2(score * (2 * LOG2E * SCALE / SOFTCAP)) + 1)
        score = score * LOG2E
    else:
        score = score * (SCALE * LOG2E)
    if MASKED:
        visible = n[None, :] <= at[:, None]
        if WINDOW > 0:
            visible = visible & (n[None, :] > at[:, None] - WINDOW)
        score = tl.where(visible, score, float("-inf"))
    highest = tl.maximum(m, tl.max(score, 1))
    # A row that has seen no key yet has no maximum; -inf - -inf is NaN.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    fade = tl.exp2(m - base)
    p = tl.exp2(score - base[:, None])
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return highest, total, acc


@triton.jit
def decode(
    q_ptr, kv_ptr, query_start_ptr, query_len_ptr, context_len_ptr, table_ptr, out_ptr, acc_ptr, ml_ptr, S, M, programs,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, SP: tl.constexpr,
    SHORT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One task of one short row and one KV head. Grid: (programs + rows, K).

    A row's only task writes its result; otherwise each writes (acc, m, total) for `combine`.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    G: tl.constexpr = H // K
    task = tl.program_id(0)
    head = tl.program_id(1)
    queries, tiles, firsts, tasks = _share(query_len_ptr, context_len_ptr, S, programs, SP, SHORT, BN, WINDOW)
    ends = tl.cumsum(tasks, 0)
    row = tl.sum((ends <= task).to(tl.int32))
    if row >= S:
        return
    parts = _at(tasks, row, SP)
    part = task - (_at(ends, row, SP) - parts)
    count = _at(queries, row, SP)
    length = _at(tiles, row, SP)
    first = _at(firsts, row, SP)
    context = tl.load(context_len_ptr + row)
    token = tl.load(query_start_ptr + row).to(tl.int64)

    r = tl.arange(0, BM)
    d = tl.arange(0, DP)
    live = r < count * G
    at = context - count + tl.minimum(r // G, count - 1)
    keep = live[:, None] & (d < D)[None, :]
    place = ((token + r // G) * H + head * G + r % G)[:, None] * D + d[None, :]
    q = tl.load(q_ptr + place, mask=keep, other=0.0)
    low = context - context
    if WINDOW > 0:
        low = tl.maximum(context - count - WINDOW + 1, 0)
    table = table_ptr + row.to(tl.int64) * M
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    # Tasks of a row differ by at most one tile.
    begin = first + length * part // parts
    end = first + length * (part + 1) // parts
    blocks = _blocks(table, begin, low, context, B, BN)
    for tile in range(begin, end):
        m, total, acc = _attend(
            q, m, total, acc, kv_ptr, blocks, tile, low, context, at, head,
            K, D, DP, B, BN, SCALE, SOFTCAP, WINDOW, True,
        )  # fmt: skip
        blocks = _blocks(table, tile + 1, low, context, B, BN)
    if parts == 1:
        tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=keep)
    else:
        own = task.to(tl.int64) * K + head
        tl.store(acc_ptr + (own * BM + r)[:, None] * D + d[None, :], acc, mask=keep)
        tl.store(ml_ptr + own * (2 * BM) + r, m, mask=live)
        tl.store(ml_ptr + own * (2 * BM) + BM + r, total, mask=live)


@triton.jit
def combine(
    query_start_ptr, query_len_ptr, context_len_ptr, out_ptr, acc_ptr, ml_ptr, T, S, programs,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, SHORT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GP: tl.constexpr, CP: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Join the tasks of each query of a short row, in order, CP at a time; zero the tokens behind the last sequence.

    Jobs are (token, KV head); a fixed number of programs shares them. Grid: (anything,).
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    G: tl.constexpr = H // K
    i = tl.arange(0, SP)
    queries, _, _, tasks = _share(query_len_ptr, context_len_ptr, S, programs, SP, SHORT, BN, WINDOW)
    task_ends = tl.cumsum(tasks, 0)
    query_ends = tl.cumsum(queries, 0)
    starts = tl.load(query_start_ptr + i, mask=i < S, other=0)
    lengths = tl.load(query_len_ptr + i, mask=i < S, other=0)
    covered = tl.max(tl.where(lengths > 0, starts + lengths, 0))
    short = tl.sum(queries)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    keep = (g < G)[:, None] & (d < D)[None, :]
    for job in range(tl.program_id(0), tl.maximum(T - covered, 0) * K, tl.num_programs(0)):
        token = (covered + job // K).to(tl.int64)
        place = (token * H + job % K * G + g)[:, None] * D + d[None, :]
        tl.store(out_ptr + place, tl.zeros((GP, DP), out_ptr.dtype.element_ty), mask=keep)
    for job in range(tl.program_id(0), short * K, tl.num_programs(0)):
        head = job % K
        index = job // K
        row = tl.sum((query_ends <= index).to(tl.int32))
        query = index - (_at(query_ends, row, SP) - _at(queries, row, SP))
        begin = _at(task_ends, row, SP) - _at(tasks, row, SP)
        # What one task did alone is there already.
        parts = tl.where(_at(tasks, row, SP) > 1, _at(tasks, row, SP), 0)
        at = query * G + g
        highest = tl.full((GP,), float("-inf"), tl.float32)
        total = tl.zeros((GP,), tl.float32)
        acc = tl.zeros((GP, DP), tl.float32)
        for chunk in range(0, parts, CP):
            c = chunk + tl.arange(0, CP)
            own = (begin + c).to(tl.int64) * K + head
            live = (c < parts)[:, None] & (g < G)[None, :]
            ml = ml_ptr + (own * (2 * BM))[:, None] + at[None, :]
            m = tl.load(ml, mask=live, other=float("-inf"))
            sums = tl.load(ml + BM, mask=live, other=0.0)
            place = ((own * BM)[:, None] + at[None, :])[:, :, None] * D + d[None, None, :]
            x = tl.load(acc_ptr + place, mask=live[:, :, None] & (d < D)[None, None, :], other=0.0)
            top = tl.maximum(highest, tl.max(m, 0))
            base = tl.where(top == float("-inf"), 0.0, top)
            weight = tl.exp2(m - base[None, :])
            fade = tl.exp2(highest - base)
            total = total * fade + tl.sum(sums * weight, 0)
            acc = acc * fade[:, None] + tl.sum(x * weight[:, :, None], 0)
            highest = top
        token = (_at(starts, row, SP) + query).to(tl.int64)
        place = (token * H + head * G + g)[:, None] * D + d[None, :]
        y = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=keep & (parts > 0))


@triton.jit
def prefill(
    q_ptr, kv_ptr, query_start_ptr, query_len_ptr, context_len_ptr, table_ptr, out_ptr, S, M,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, SP: tl.constexpr,
    SHORT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of BM // G queries of one long row, and one KV head. Grid: (tiles at most, K)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    G: tl.constexpr = H // K
    QT: tl.constexpr = BM // G
    head = tl.program_id(1)
    i = tl.arange(0, SP)
    lengths = tl.load(query_len_ptr + i, mask=i < S, other=0)
    tiles = tl.where(lengths > SHORT, (lengths + QT - 1) // QT, 0)
    ends = tl.cumsum(tiles, 0)
    # Last tiles first: they see the most keys, and what starts last should be short.
    index = tl.sum(tiles) - 1 - tl.program_id(0)
    if index < 0:
        return
    row = tl.sum((ends <= index).to(tl.int32))
    query = (index - (_at(ends, row, SP) - _at(tiles, row, SP))) * QT
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
    blocks = _blocks(table, low // BN, low, context, B, BN)
    middle = low // BN
    if WINDOW == 0:
        middle = (position + 1) // BN
        for tile in range(0, middle):
            m, total, acc = _attend(
                q, m, total, acc, kv_ptr, blocks, tile, low, context, at, head,
                K, D, DP, B, BN, SCALE, SOFTCAP, WINDOW, False,
            )  # fmt: skip
            blocks = _blocks(table, tile + 1, low, context, B, BN)
    for tile in range(middle, last):
        m, total, acc = _attend(
            q, m, total, acc, kv_ptr, blocks, tile, low, context, at, head,
            K, D, DP, B, BN, SCALE, SOFTCAP, WINDOW, True,
        )  # fmt: skip
        blocks = _blocks(table, tile + 1, low, context, B, BN)
    tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=keep)
