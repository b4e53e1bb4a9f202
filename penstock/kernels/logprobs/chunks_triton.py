"""Log-probabilities of the best tokens and of a row's own, without sorting, in two launches.

1. `survey`, the vocabulary split over programs: a chunk's largest logit and its mass exp(logit - peak), and the best
   token of each *group* of a few.
2. `merge` finishes each row in one program: the mass of all chunks; the n best groups, for the n best tokens lie in
   them; and of their tokens the n best.

A logit and its token are compared as one number, its *key*: the higher logit first, then the lower token. A row's slot
says how many it asks for; rows that ask nothing end at once. Not a number counts as minus infinity.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.sample.row_triton import NOWHERE, float_of, logits_at, mass_of, order_of, quad_of

NO_KEY = tl.constexpr(-(1 << 63))


@triton.jit
def _asked(slots, slot, CONTROLS: tl.constexpr, CONTROLS_AT: tl.constexpr):  # type: ignore[no-untyped-def]
    """(The slot's controls, what it asks for: 0 nothing, n + 1 the n best and its own token.)"""
    asked = slots + CONTROLS_AT + slot * CONTROLS
    return asked, tl.load(asked + 10, mask=slot >= 0, other=0)


@triton.jit
def _key(x, token):  # type: ignore[no-untyped-def]
    """Complemented, lower tokens are higher."""
    return (order_of(tl.where(x == 0, 0.0, x)).to(tl.int64) << 32) | (token ^ NOWHERE).to(tl.int64)


@triton.jit
def _token_of(key):  # type: ignore[no-untyped-def]
    """NOWHERE, if there is none."""
    return (key & NOWHERE).to(tl.int32) ^ NOWHERE


@triton.jit
def survey(  # type: ignore[no-untyped-def]
    logits,
    adjusted,
    sampled,
    slots,
    logit_slots,
    sample_position,
    peaks,
    masses,
    keys,
    V: tl.constexpr,
    CONTROLS: tl.constexpr,
    CONTROLS_AT: tl.constexpr,
    HISTORY: tl.constexpr,
    HISTORY_AT: tl.constexpr,
    LANES: tl.constexpr,
    SIZE: tl.constexpr,
    MOST: tl.constexpr,
    PDL: tl.constexpr,
):
    """By chunk: peaks and masses [L,chunks], keys [L,groups]; of no token in groups behind the vocabulary. Only what is
    used is written."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk, row = tl.program_id(0), tl.program_id(1)
    asked, count = _asked(slots, tl.load(logit_slots + row), CONTROLS, CONTROLS_AT)
    if count > 0:
        group = chunk * LANES + tl.arange(0, LANES)
        token = quad_of(group[None, :], tl.arange(0, SIZE // 4)[:, None], LANES, SIZE)[:, :, None] + tl.arange(0, 4)
        source = row.to(tl.int64) * V + token
        x = logits_at(logits + source, token < V)
        at = row * tl.num_programs(0) + chunk
        peak = tl.max(x)
        tl.store(peaks + at, peak)
        tl.store(masses + at, tl.sum(mass_of(x, peak)))
        if count > 1:
            if tl.load(asked + 11) != 0:
                x = logits_at(adjusted + source, token < V)
            most = tl.max(tl.max(x, 2), 0)
            first = tl.where((x == most[None, :, None]) & (token < V), token, NOWHERE)
            key = _key(most, tl.min(tl.min(first, 2), 0))
            tl.store(keys + at.to(tl.int64) * LANES + tl.arange(0, LANES), key)


@triton.jit
def _less(x, total):  # type: ignore[no-untyped-def]
    """x - total, as the reference has it where they are infinite."""
    return tl.where(x > -float("inf"), tl.where(x == total, 0.0, x - total), -float("inf"))


@triton.jit
def _total(peaks, masses, row, CHUNKS: tl.constexpr, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The logarithm of the sum of exponentials of a row."""
    chunk = tl.arange(0, PADDED)
    peak = tl.load(peaks + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=-float("inf"))
    mass = tl.load(masses + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=0.0)
    top = tl.max(peak)
    return tl.where(tl.abs(top) < float("inf"), top + tl.log(tl.sum(mass * mass_of(peak, top))), top)


@triton.jit
def _best(key, count, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The `count` largest keys, in order, [MOST]."""
    place = tl.arange(0, MOST)
    best = tl.full((MOST,), NO_KEY, tl.int64)
    for number in range(0, count):
        largest = tl.max(key, 0)
        best = tl.where(place == number, largest, best)
        key = tl.where(key == largest, NO_KEY, key)
    return best


@triton.jit
def _candidates(  # type: ignore[no-untyped-def]
    best, source, V: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr, MOST: tl.constexpr
):
    """The keys of all tokens of the groups that have these keys, [MOST * SIZE]."""
    token = _token_of(best)
    group = token // (LANES * SIZE) * LANES + token % (LANES * SIZE) // 4 % LANES
    part = tl.arange(0, SIZE)[None, :]
    member = quad_of(group[:, None], part // 4, LANES, SIZE) + part % 4
    inside = (token < V)[:, None] & (member < V)
    key = tl.where(inside, _key(logits_at(source + member, inside), member), NO_KEY)
    return tl.reshape(key, (MOST * SIZE,))


@triton.jit
def merge(  # type: ignore[no-untyped-def]
    logits,
    adjusted,
    sampled,
    slots,
    logit_slots,
    sample_position,
    peaks,
    masses,
    keys,
    top_ids,
    top_values,
    chosen,
    V: tl.constexpr,
    CONTROLS: tl.constexpr,
    CONTROLS_AT: tl.constexpr,
    HISTORY: tl.constexpr,
    HISTORY_AT: tl.constexpr,
    LANES: tl.constexpr,
    SIZE: tl.constexpr,
    MOST: tl.constexpr,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """top_ids, top_values [L,MOST], chosen [L]. One program for each row. PADDED: CHUNKS rounded up to a power of 2."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    slot = tl.load(logit_slots + row)
    asked, count = _asked(slots, slot, CONTROLS, CONTROLS_AT)
    source = row.to(tl.int64) * V
    best, total, own = tl.full((MOST,), NO_KEY, tl.int64), tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    if count > 0:
        total = _total(peaks, masses, row, CHUNKS, PADDED)
        if count > 1:
            group = tl.arange(0, PADDED * LANES)
            at = row.to(tl.int64) * (CHUNKS * LANES) + group
            key = tl.load(keys + at, mask=group < CHUNKS * LANES, other=NO_KEY)
            best = _best(key, count - 1, MOST)
            if tl.load(asked + 11) != 0:
                held = _candidates(best, adjusted + source, V, LANES, SIZE, MOST)
            else:
                held = _candidates(best, logits + source, V, LANES, SIZE, MOST)
            best = _best(held, count - 1, MOST)
        position = tl.load(sample_position + row)
        in_prompt = position < tl.load(asked)
        following = tl.load(slots + HISTORY_AT + slot * HISTORY + position, mask=in_prompt, other=0)
        token = tl.where(in_prompt, following, tl.load(sampled + row))
        own = _less(logits_at(logits + source + token, (token >= 0) & (token < V)), total)
    place = row * MOST + tl.arange(0, MOST)
    found = best != NO_KEY
    tl.store(top_ids + place, tl.where(found, _token_of(best), -1))
    tl.store(top_values + place, tl.where(found, _less(float_of((best >> 32).to(tl.int32)), total), 0.0))
    tl.store(chosen + row, own)
