"""Latent attention: tiles of queries and heads over keys whose last numbers are the values too."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.attention.attend_triton import blocks_of
from penstock.kernels.attention.prefill_triton import find_part
from penstock.kernels.attention.tasks_triton import finish


@triton.jit
def _half(x_ptr, start, alive, column, N: tl.constexpr):
    """Rows that begin at `start`, of N numbers from there on."""
    return tl.load(x_ptr + start[:, None] + column[None, :], mask=alive[:, None] & (column < N)[None, :], other=0.0)


@triton.jit
def latent_attention(
    q_ptr, kv_ptr, query_start_ptr, query_len_ptr, context_len_ptr, table_ptr, out_ptr, acc_ptr, ml_ptr, count_ptr,
    T, S, M, programs, least,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    DC: tl.constexpr, B: tl.constexpr, SP: tl.constexpr, PM: tl.constexpr, PN: tl.constexpr, CUT: tl.constexpr,
    SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One task of a tile of PM (query, head) pairs, of one of K equal shares of the heads. Grid: (K (1 + tasks at
    most)); of each share programs without a task, at least one, zero what lies behind the last sequence.

    R + C numbers are a key, the last C of them the value. Before the wait only what `prepare` wrote is read: see
    `Draft` for why that is there by then.
    """
    G: tl.constexpr = H // K
    QT: tl.constexpr = PM // G
    index, head = tl.program_id(0) // K, tl.program_id(0) % K
    task, row, query, part, parts = find_part(
        index, query_len_ptr, context_len_ptr, S, programs, least, SP, 0, QT, PN, CUT, 0
    )
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    r, of_c = tl.arange(0, PM), tl.arange(0, CP)
    if task < 0:
        idle = tl.num_programs(0) // K - (index + 1 + task)
        _clear(out_ptr, query_start_ptr, query_len_ptr, -1 - task, idle, head, r, of_c, T, S, H, G, C, SP)
        return
    of_r = tl.arange(0, RP)
    count = tl.load(query_len_ptr + row, cache_modifier=".cg")
    context = tl.load(context_len_ptr + row, cache_modifier=".cg")
    token = tl.load(query_start_ptr + row, cache_modifier=".cg").to(tl.int64) + query
    queries = tl.minimum(count - query, QT)
    live = r < queries * G
    start = (token + r // G) * H + head * G + r % G
    position = context - count + query
    at = position + tl.minimum(r // G, queries - 1)
    table = table_ptr + row.to(tl.int64) * M
    begin = position - position
    end = (position + queries - 1) // PN + 1
    if CUT and parts > 1:
        begin = end * part // parts
        end = end * (part + 1) // parts
    q_r = _half(q_ptr, start * (R + C), live, of_r, R)
    q_c = _half(q_ptr + R, start * (R + C), live, of_c, C)
    m, total = tl.full((PM,), float("-inf"), tl.float32), tl.zeros((PM,), tl.float32)
    acc = tl.zeros((PM, CP), tl.float32)
    UNIT: tl.constexpr = SCALE * 1.4426950408889634  # scores in base 2
    for tile in range(begin, end):
        n = tile * PN + tl.arange(0, PN)
        blocks = blocks_of(table, tile, 0, context, B, PN)
        place = (blocks.to(tl.int64) * B + n % B) * (R + C)
        k_r = _half(kv_ptr, place, n < context, of_r, R).to(q_r.dtype)
        k_c = _half(kv_ptr + R, place, n < context, of_c, C).to(q_c.dtype)
        score = tl.dot(q_r, tl.trans(k_r), input_precision="ieee")
        score = tl.dot(q_c, tl.trans(k_c), score, input_precision="ieee") * UNIT
        score = tl.where(n[None, :] <= at[:, None], score, float("-inf"))
        highest = tl.maximum(m, tl.max(score, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        fade = tl.exp2(m - base)
        p = tl.exp2(score - base[:, None])
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(k_c.dtype), k_c, acc * fade[:, None], input_precision="ieee")
        m = highest
    if CUT:
        finish(
            m, total, acc, out_ptr, acc_ptr, ml_ptr, count_ptr, start * C, live, task, part, parts, task - part, head,
            K, C, CP, DC, PM,
        )  # fmt: skip
    else:
        y = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (start * C)[:, None] + of_c[None, :], y, mask=live[:, None] & (of_c < C)[None, :])


@triton.jit
def _clear(
    out_ptr, query_start_ptr, query_len_ptr, index, idle, head, r, of_c, T, S,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Zero one share of the heads in the tokens behind the last sequence, the idle programs in turn."""
    i = tl.arange(0, SP)
    starts = tl.load(query_start_ptr + i, mask=i < S, other=0)
    lengths = tl.load(query_len_ptr + i, mask=i < S, other=0)
    covered = tl.max(tl.where(lengths > 0, starts + lengths, 0), 0)
    keep = (r < G)[:, None] & (of_c < C)[None, :]
    for i in range(index, T - covered, idle):
        place = (((covered + i).to(tl.int64) * H + head * G + r) * C)[:, None] + of_c[None, :]
        tl.store(out_ptr + place, tl.zeros(place.shape, out_ptr.dtype.element_ty), mask=keep)
