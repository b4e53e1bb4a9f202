"""Tasks over a share of the keys: how short rows are cut, and how tasks are joined by the last of them to arrive."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cut(queries, context, SHORT: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr):
    """Numbers or vectors over sequences: (first tile of keys of a short row, tiles)."""
    first = context - context
    if WINDOW > 0:
        first = tl.maximum(context - queries - WINDOW + 1, 0) // BN
    return first, tl.where((queries > 0) & (queries <= SHORT), (context + BN - 1) // BN - first, 0)


@triton.jit
def find_task(
    task, query_len_ptr, context_len_ptr, S, programs, least,
    SP: tl.constexpr, SHORT: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Which part of which row task number `task` is: the same cut in every program.

    All tiles of keys of all short rows are divided by `programs`, though no task gets less than `least` of them; a row
    gets as many tasks as its share of the whole, rounded up. So there are at most programs + rows tasks, however
    contexts differ, and tasks of a row differ by at most one tile.
    Returns (row, its queries, its context, part, parts, first tile, end tile); row S: there is no such
    task, and the part is its number beyond the last.
    """
    if SP == 1:
        queries = tl.load(query_len_ptr, cache_modifier=".cg")
        _, tiles = _cut(queries, tl.load(context_len_ptr, cache_modifier=".cg"), SHORT, BN, WINDOW)
        most = tl.maximum((tiles + programs - 1) // programs, least)
        row = tl.where(task * most < tiles, 0, S)
        start = tl.where(task * most < tiles, 0, (tiles + most - 1) // most)
    else:
        i = tl.arange(0, SP)
        queries = tl.load(query_len_ptr + i, mask=i < S, other=0, cache_modifier=".cg")
        contexts = tl.load(context_len_ptr + i, mask=i < S, other=0, cache_modifier=".cg")
        _, tiles = _cut(queries, contexts, SHORT, BN, WINDOW)
        most = tl.maximum((tl.sum(tiles) + programs - 1) // programs, least)
        ends = tl.cumsum((tiles + most - 1) // most, 0)
        before = ends <= task
        row = tl.minimum(tl.sum(before.to(tl.int32)), S)
        start = tl.max(tl.where(before, ends, 0), 0)
    # One row's numbers come back from the cache sooner than out of the vectors.
    count = tl.load(query_len_ptr + row, mask=row < S, other=0, cache_modifier=".cg")
    context = tl.load(context_len_ptr + row, mask=row < S, other=0, cache_modifier=".cg")
    first, length = _cut(count, context, SHORT, BN, WINDOW)
    parts = tl.maximum((length + most - 1) // most, 1)
    part = task - start
    return row, count, context, part, parts, first + length * part // parts, first + length * (part + 1) // parts


@triton.jit
def finish(
    m, total, acc, out_ptr, acc_ptr, ml_ptr, count_ptr, start, live, task, part, parts, row, head,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write a tile's result where this is its only task; otherwise leave (acc, m, total) for the last to arrive.

    `start`, `live`: where each of the tile's BM rows begins in the result, and whether it is one. The last to arrive
    joins the parts in their order, whatever order they came in, so the result never varies: DC columns at a time, as
    many as its registers hold. It sets counter number `row` back to zero. Counters are shared with other launches of
    the step: call this behind `gdc_wait` only.
    """
    d = tl.arange(0, DP)
    keep = live[:, None] & (d < D)[None, :]
    if parts == 1:
        y = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + start[:, None] + d[None, :], y, mask=keep)
    else:
        r = tl.arange(0, BM)
        own = task.to(tl.int64) * K + head
        tl.store(acc_ptr + (own * BM + r)[:, None] * D + d[None, :], acc, mask=keep)
        tl.store(ml_ptr + own * (2 * BM) + r, m, mask=live)
        tl.store(ml_ptr + own * (2 * BM) + BM + r, total, mask=live)
        # The barrier puts every thread's stores before the one thread that releases them.
        tl.debug_barrier()
        counter = count_ptr + row * K + head
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        if arrived == parts - 1:
            tl.store(counter, 0)
            for first in tl.static_range(0, DP, DC):
                y = _joined(acc_ptr, ml_ptr, live, task - part, parts, head, first, K, D, DC, BM)
                column = (first + tl.arange(0, DC))[None, :]
                inside = live[:, None] & (column < D)
                tl.store(out_ptr + start[:, None] + column, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _joined(
    acc_ptr, ml_ptr, live, begin, parts, head, first,
    K: tl.constexpr, D: tl.constexpr, DC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Columns of the softmax of all parts of a tile, four at a time so that their loads are under way together."""
    highest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DC), tl.float32)
    for part in range(0, parts, 4):
        a, s, x = _part(acc_ptr, ml_ptr, live, begin, part, parts, head, first, K, D, DC, BM)
        b, t, y = _part(acc_ptr, ml_ptr, live, begin, part + 1, parts, head, first, K, D, DC, BM)
        c, u, z = _part(acc_ptr, ml_ptr, live, begin, part + 2, parts, head, first, K, D, DC, BM)
        e, v, w = _part(acc_ptr, ml_ptr, live, begin, part + 3, parts, head, first, K, D, DC, BM)
        top = tl.maximum(tl.maximum(tl.maximum(a, b), tl.maximum(c, e)), highest)
        base = tl.where(top == float("-inf"), 0.0, top)
        old = tl.exp2(highest - base)
        a, b, c, e = tl.exp2(a - base), tl.exp2(b - base), tl.exp2(c - base), tl.exp2(e - base)
        total = total * old + s * a + t * b + u * c + v * e
        acc = acc * old[:, None] + x * a[:, None] + y * b[:, None] + z * c[:, None] + w * e[:, None]
        highest = top
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _part(
    acc_ptr, ml_ptr, live, begin, part, parts, head, first,
    K: tl.constexpr, D: tl.constexpr, DC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """(m, total, acc) of one part, or of nothing. It was written by another program: no L1 may answer."""
    r = tl.arange(0, BM)
    d = first + tl.arange(0, DC)
    alive = live & (part < parts)
    own = (begin + part).to(tl.int64) * K + head
    m = tl.load(ml_ptr + own * (2 * BM) + r, mask=alive, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(ml_ptr + own * (2 * BM) + BM + r, mask=alive, other=0.0, cache_modifier=".cg")
    keep = alive[:, None] & (d < D)[None, :]
    place = (own * BM + r)[:, None] * D + d[None, :]
    return m, total, tl.load(acc_ptr + place, mask=keep, other=0.0, cache_modifier=".cg")
