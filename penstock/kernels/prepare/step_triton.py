"""The step's own kernels: apply the upload to the slots, expand its rows, and write results back.

The upload is i32: num_rows, num_tokens, num_logits, num_writes; for each row its slot, its tokens, whether it samples;
then num_writes pairs of index and value. Sizes come from the device; of the bucket's, only how far to pad is known.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEADER = tl.constexpr(4)
ROW = tl.constexpr(3)


@triton.jit
def write(slots, upload, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """slots[index] = value for every pair of the upload; the programs take blocks of pairs in turn."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pairs = upload + HEADER + ROW * tl.load(upload)
    count = tl.load(upload + 3)
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        index = tl.load(pairs + 2 * at, mask=at < count, other=0)
        tl.store(slots + index, tl.load(pairs + 2 * at + 1, mask=at < count, other=0), mask=at < count)


@triton.jit
def _counts(upload, BLOCK_S: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the upload's rows: (row numbers, which there are, their tokens, the tokens up to the row's end)."""
    row = tl.arange(0, BLOCK_S)
    live = row < tl.load(upload)
    count = tl.load(upload + HEADER + ROW * row + 1, mask=live, other=0)
    return row, live, count, tl.cumsum(count, 0)


@triton.jit
def _sampling(upload, row, live):  # type: ignore[no-untyped-def]
    """(which rows sample, the number of each among those)."""
    samples = live & (tl.load(upload + HEADER + ROW * row + 2, mask=live, other=0) != 0)
    return samples, tl.cumsum(samples.to(tl.int32), 0) - 1


@triton.jit
def _field(slots, slot, samples, FIELD: tl.constexpr, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(slots + FIELD * SLOTS + slot, mask=samples, other=0)


@triton.jit
def _expand_rows(  # type: ignore[no-untyped-def]
    slots,
    upload,
    query_start,
    query_len,
    context_len,
    logit_rows,
    temperature,
    top_k,
    top_p,
    seed,
    sample_position,
    S,
    L,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Everything that is one number for a row or for a row of logits; padding is zero."""
    row, live, count, ends = _counts(upload, BLOCK_S)
    slot = tl.load(upload + HEADER + ROW * row, mask=live, other=0)
    context = tl.load(slots + slot, mask=live, other=0) + count
    tl.store(query_start + row, tl.where(live, ends - count, 0), mask=row < S)
    tl.store(query_len + row, count, mask=row < S)
    tl.store(context_len + row, tl.where(live, context, 0), mask=row < S)
    samples, place = _sampling(upload, row, live)
    tl.store(logit_rows + place, ends - 1, mask=samples)
    tl.store(sample_position + place, context, mask=samples)
    hot = _field(slots, slot, samples, 1, SLOTS).to(tl.float32, bitcast=True)
    tl.store(temperature + place, hot, mask=samples)
    tl.store(top_k + place, _field(slots, slot, samples, 2, SLOTS), mask=samples)
    tl.store(top_p + place, _field(slots, slot, samples, 3, SLOTS).to(tl.float32, bitcast=True), mask=samples)
    tl.store(seed + place, _field(slots, slot, samples, 4, SLOTS), mask=samples)
    logit = tl.arange(0, BLOCK_L)
    padding = (logit >= tl.sum(samples.to(tl.int32), 0)) & (logit < L)
    zero = tl.zeros((BLOCK_L,), tl.int32)
    tl.store(logit_rows + logit, zero, mask=padding)
    tl.store(sample_position + logit, zero, mask=padding)
    tl.store(temperature + logit, zero.to(tl.float32), mask=padding)
    tl.store(top_k + logit, zero, mask=padding)
    tl.store(top_p + logit, zero.to(tl.float32), mask=padding)
    tl.store(seed + logit, zero, mask=padding)


@triton.jit
def _expand_table(  # type: ignore[no-untyped-def]
    slots,
    upload,
    block_table,
    freqs,
    row,
    M: tl.constexpr,
    FREQS: tl.constexpr,
    TABLE_AT: tl.constexpr,
    FREQS_AT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_FREQS: tl.constexpr,
):
    """One row of the block table, and its own rope frequencies where requests have them."""
    live = row < tl.load(upload)
    slot = tl.load(upload + HEADER + ROW * row, mask=live, other=0)
    for start in tl.static_range(0, M, BLOCK_M):
        entry = start + tl.arange(0, BLOCK_M)
        inside = entry < M
        blocks = tl.load(slots + TABLE_AT + slot * M + entry, mask=inside & live, other=0)
        tl.store(block_table + row * M + entry, blocks, mask=inside)
    if FREQS > 0:
        entry = tl.arange(0, BLOCK_FREQS)
        inside = entry < FREQS
        own = tl.load(slots + FREQS_AT + slot * FREQS + entry, mask=inside & live, other=0)
        tl.store(freqs + row * FREQS + entry, own.to(tl.float32, bitcast=True), mask=inside)


@triton.jit
def _expand_tokens(  # type: ignore[no-untyped-def]
    slots,
    upload,
    tokens,
    positions,
    rows,
    block,
    T,
    HISTORY: tl.constexpr,
    HISTORY_AT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A token's row is the number of rows that end at or before it; padding tokens are 0 at position 0 of row -1."""
    _, _, count, ends = _counts(upload, BLOCK_S)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < tl.sum(count, 0)
    before = ends[None, :] <= t[:, None]
    row = tl.sum(before.to(tl.int32), 1)
    start = tl.max(tl.where(before, ends[None, :], 0), 1)
    slot = tl.load(upload + HEADER + ROW * row, mask=live, other=0)
    position = tl.load(slots + slot, mask=live, other=0) + t - start
    token = tl.load(slots + HISTORY_AT + slot * HISTORY + position, mask=live, other=0)
    tl.store(tokens + t, token, mask=t < T)
    tl.store(positions + t, tl.where(live, position, 0), mask=t < T)
    tl.store(rows + t, tl.where(live, row, -1), mask=t < T)


@triton.jit
def expand(  # type: ignore[no-untyped-def]
    slots,
    upload,
    tokens,
    positions,
    rows,
    query_start,
    query_len,
    context_len,
    block_table,
    logit_rows,
    temperature,
    top_k,
    top_p,
    seed,
    sample_position,
    freqs,
    T,
    S,
    L,
    SLOTS: tl.constexpr,
    HISTORY: tl.constexpr,
    M: tl.constexpr,
    FREQS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_FREQS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program 0 expands the vectors, the next S a row of the tables each, the rest BLOCK_T tokens each."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    FREQS_AT: tl.constexpr = 5 * SLOTS  # as SlotLayout says: five fields, frequencies, tables, histories
    TABLE_AT: tl.constexpr = FREQS_AT + SLOTS * FREQS
    HISTORY_AT: tl.constexpr = TABLE_AT + SLOTS * M
    program = tl.program_id(0)
    if program == 0:
        _expand_rows(
            slots, upload, query_start, query_len, context_len, logit_rows, temperature, top_k, top_p, seed,
            sample_position, S, L, SLOTS, BLOCK_S, BLOCK_L,
        )  # fmt: skip
    elif program <= S:
        _expand_table(
            slots, upload, block_table, freqs, program - 1, M, FREQS, TABLE_AT, FREQS_AT, BLOCK_M, BLOCK_FREQS
        )
    else:
        _expand_tokens(
            slots, upload, tokens, positions, rows, program - 1 - S, T, HISTORY, HISTORY_AT, BLOCK_S, BLOCK_T
        )


@triton.jit
def commit(  # type: ignore[no-untyped-def]
    slots,
    upload,
    sampled,
    SLOTS: tl.constexpr,
    HISTORY: tl.constexpr,
    HISTORY_AT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):
    """Lengthen the step's slots by their tokens; put each sampled token behind them. One program."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, live, count, _ = _counts(upload, BLOCK_S)
    slot = tl.load(upload + HEADER + ROW * row, mask=live, other=0)
    length = tl.load(slots + slot, mask=live, other=0) + count
    samples, place = _sampling(upload, row, live)
    token = tl.load(sampled + place, mask=samples, other=0)
    tl.store(slots + slot, length, mask=live)
    tl.store(slots + HISTORY_AT + slot * HISTORY + length, token, mask=samples)
