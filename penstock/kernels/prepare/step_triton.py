"""The step's own kernels: apply the upload to the slots, expand its rows, and write results back.

The upload is i32: num_rows, num_tokens, num_logits, num_writes; for each row its slot, its tokens, its rows of logits;
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
def _asked(upload, row, live):  # type: ignore[no-untyped-def]
    """(rows of logits of each row, those up to its end)."""
    asked = tl.load(upload + HEADER + ROW * row + 2, mask=live, other=0)
    return asked, tl.cumsum(asked, 0)


@triton.jit
def _expand_rows(  # type: ignore[no-untyped-def]
    slots, upload, query_start, query_len, context_len, slot_of_row, encoder_len, S, SLOT_ROWS: tl.constexpr,
    ENCODER: tl.constexpr, ENCODER_AT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Everything that is one number for a row; padding is zero, its slot -1."""
    row, live, count, ends = _counts(upload, BLOCK_S)
    slot = tl.load(upload + HEADER + ROW * row, mask=live, other=0)
    context = tl.load(slots + slot, mask=live, other=0) + count
    tl.store(query_start + row, tl.where(live, ends - count, 0), mask=row < S)
    tl.store(query_len + row, count, mask=row < S)
    tl.store(context_len + row, tl.where(live, context, 0), mask=row < S)
    if SLOT_ROWS:
        tl.store(slot_of_row + row, tl.where(live, slot, -1), mask=row < S)
    if ENCODER:
        own = tl.load(slots + ENCODER_AT + slot, mask=live, other=0)
        tl.store(encoder_len + row, tl.where(live, own, 0), mask=row < S)


@triton.jit
def _field(slots, slot, live, FIELD: tl.constexpr, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(slots + FIELD * SLOTS + slot, mask=live, other=0)


@triton.jit
def _expand_logits(  # type: ignore[no-untyped-def]
    slots,
    upload,
    logit_rows,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    sample_position,
    logit_slots,
    block,
    L,
    SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Everything that is one number for a row of logits: found as a token's row is; padding is zero, its slot -1."""
    rows, there, _, ends = _counts(upload, BLOCK_S)
    _, asked_ends = _asked(upload, rows, there)
    logit = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = logit < L
    before = asked_ends[None, :] <= logit[:, None]
    row = tl.sum(before.to(tl.int32), 1)
    live = logit < tl.max(asked_ends, 0)
    left = tl.min(tl.where(before, 2147483647, asked_ends[None, :]), 1) - 1 - logit
    end = tl.min(tl.where(before, 2147483647, ends[None, :]), 1)
    slot = tl.load(upload + HEADER + ROW * row, mask=live, other=0)
    tokens = tl.load(upload + HEADER + ROW * row + 1, mask=live, other=0)
    context = tl.load(slots + slot, mask=live, other=0) + tokens
    tl.store(logit_rows + logit, tl.where(live, end - 1 - left, 0), mask=inside)
    tl.store(sample_position + logit, tl.where(live, context - left, 0), mask=inside)
    tl.store(logit_slots + logit, tl.where(live, slot, -1), mask=inside)
    tl.store(temperature + logit, _field(slots, slot, live, 1, SLOTS).to(tl.float32, bitcast=True), mask=inside)
    tl.store(top_k + logit, _field(slots, slot, live, 2, SLOTS), mask=inside)
    tl.store(top_p + logit, _field(slots, slot, live, 3, SLOTS).to(tl.float32, bitcast=True), mask=inside)
    tl.store(min_p + logit, _field(slots, slot, live, 4, SLOTS).to(tl.float32, bitcast=True), mask=inside)
    tl.store(seed + logit, _field(slots, slot, live, 5, SLOTS), mask=inside)


@triton.jit
def _copy_table(slots, block_table, row, at, live, M: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """The M entries at `at`, of a row that is there."""
    for start in tl.static_range(0, M, BLOCK_M):
        entry = start + tl.arange(0, BLOCK_M)
        inside = entry < M
        blocks = tl.load(slots + at + entry, mask=inside & live, other=0)
        tl.store(block_table + row * M + entry, blocks, mask=inside)


@triton.jit
def _expand_tables(  # type: ignore[no-untyped-def]
    slots,
    upload,
    block_table,
    block_table1,
    block_table2,
    block_table3,
    freqs,
    row,
    SLOTS: tl.constexpr,
    TABLES: tl.constexpr,
    M: tl.constexpr,
    FREQS: tl.constexpr,
    TABLE_AT: tl.constexpr,
    FREQS_AT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_FREQS: tl.constexpr,
):
    """One row of the block tables, and its own rope frequencies where requests have them."""
    live = row < tl.load(upload)
    slot = tl.load(upload + HEADER + ROW * row, mask=live, other=0)
    at = TABLE_AT + slot * M
    _copy_table(slots, block_table, row, at, live, M, BLOCK_M)
    if TABLES > 1:
        _copy_table(slots, block_table1, row, at + SLOTS * M, live, M, BLOCK_M)
    if TABLES > 2:
        _copy_table(slots, block_table2, row, at + 2 * SLOTS * M, live, M, BLOCK_M)
    if TABLES > 3:
        _copy_table(slots, block_table3, row, at + 3 * SLOTS * M, live, M, BLOCK_M)
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
    min_p,
    seed,
    sample_position,
    logit_slots,
    freqs,
    block_table1,
    block_table2,
    block_table3,
    slot_of_row,
    encoder_len,
    T,
    S,
    L,
    SLOTS: tl.constexpr,
    HISTORY: tl.constexpr,
    M: tl.constexpr,
    FREQS: tl.constexpr,
    TABLES: tl.constexpr,
    SLOT_ROWS: tl.constexpr,
    ENCODER: tl.constexpr,
    FREQS_AT: tl.constexpr,
    ENCODER_AT: tl.constexpr,
    TABLE_AT: tl.constexpr,
    HISTORY_AT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_FREQS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program 0 expands the rows, the next S a row of the tables each, then each BLOCK_T rows of logits, or tokens."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    by_logit = 1 + S + (L + BLOCK_T - 1) // BLOCK_T
    if program == 0:
        _expand_rows(
            slots, upload, query_start, query_len, context_len, slot_of_row, encoder_len, S, SLOT_ROWS, ENCODER,
            ENCODER_AT, BLOCK_S,
        )  # fmt: skip
    elif program <= S:
        _expand_tables(
            slots, upload, block_table, block_table1, block_table2, block_table3, freqs, program - 1, SLOTS, TABLES, M,
            FREQS, TABLE_AT, FREQS_AT, BLOCK_M, BLOCK_FREQS,
        )  # fmt: skip
    elif program < by_logit:
        _expand_logits(
            slots, upload, logit_rows, temperature, top_k, top_p, min_p, seed, sample_position, logit_slots,
            program - 1 - S, L, SLOTS, BLOCK_S, BLOCK_T,
        )  # fmt: skip
    else:
        _expand_tokens(
            slots, upload, tokens, positions, rows, program - by_logit, T, HISTORY, HISTORY_AT, BLOCK_S, BLOCK_T
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
    """Lengthen the step's slots by their tokens; put behind them what their last logits sampled. One program."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, live, count, _ = _counts(upload, BLOCK_S)
    slot = tl.load(upload + HEADER + ROW * row, mask=live, other=0)
    length = tl.load(slots + slot, mask=live, other=0) + count
    asked, asked_ends = _asked(upload, row, live)
    samples = live & (asked > 0)
    token = tl.load(sampled + asked_ends - 1, mask=samples, other=0)
    tl.store(slots + slot, length, mask=live)
    tl.store(slots + HISTORY_AT + slot * HISTORY + length, token, mask=samples)
