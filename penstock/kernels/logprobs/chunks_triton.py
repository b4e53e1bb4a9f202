"""Log-probabilities of the best tokens and of a row's own, without sorting, in two launches.

1. `survey`, the vocabulary split over programs: a chunk's largest logit, its mass exp(logit - peak), and as many of its
   best tokens as the row asks for, one after the other.
2. `merge` finishes each row in one program: the mass of all chunks, and the best of their best.

A row's slot says how many it asks for; rows that ask nothing end at once. Not a number counts as minus infinity.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.sample.row_triton import NOWHERE, first_best, logits_at, mass_of


@triton.jit
def _asked(slots, slot, CONTROLS: tl.constexpr, CONTROLS_AT: tl.constexpr):  # type: ignore[no-untyped-def]
    """(The slot's controls, what it asks for: 0 nothing, n + 1 the n best and its own token.)"""
    asked = slots + CONTROLS_AT + slot * CONTROLS
    return asked, tl.load(asked + 10, mask=slot >= 0, other=0)


@triton.jit
def _without(token, x, member):  # type: ignore[no-untyped-def]
    """x and member less that token."""
    return tl.where(member == token, -float("inf"), x), tl.where(member == token, NOWHERE, member)


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
    values,
    ids,
    V: tl.constexpr,
    CONTROLS: tl.constexpr,
    CONTROLS_AT: tl.constexpr,
    HISTORY: tl.constexpr,
    HISTORY_AT: tl.constexpr,
    MOST: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """By chunk: peaks and masses [L,chunks], its best logits and their tokens [L,chunks,MOST]; NOWHERE behind its last
    token. Only what is used is written."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk, row = tl.program_id(0), tl.program_id(1)
    asked, count = _asked(slots, tl.load(logit_slots + row), CONTROLS, CONTROLS_AT)
    if count > 0:
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        source = row.to(tl.int64) * V + token
        x = logits_at(logits + source, token < V)
        at = row * tl.num_programs(0) + chunk
        peak = tl.max(x)
        tl.store(peaks + at, peak)
        tl.store(masses + at, tl.sum(mass_of(x, peak)))
        if tl.load(asked + 11) != 0:
            x = logits_at(adjusted + source, token < V)
        member = tl.where(token < V, token, NOWHERE)
        for place in range(0, count - 1):
            value, first = first_best(x, member)
            tl.store(values + at * MOST + place, value)
            tl.store(ids + at * MOST + place, first)
            x, member = _without(first, x, member)


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
def merge(  # type: ignore[no-untyped-def]
    logits,
    adjusted,
    sampled,
    slots,
    logit_slots,
    sample_position,
    peaks,
    masses,
    values,
    ids,
    top_ids,
    top_values,
    chosen,
    V: tl.constexpr,
    CONTROLS: tl.constexpr,
    CONTROLS_AT: tl.constexpr,
    HISTORY: tl.constexpr,
    HISTORY_AT: tl.constexpr,
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
    place = tl.arange(0, MOST)
    best, best_value = tl.full((MOST,), -1, tl.int32), tl.zeros((MOST,), tl.float32)
    own = tl.full((), 0.0, tl.float32)
    if count > 0:
        total = _total(peaks, masses, row, CHUNKS, PADDED)
        at = tl.arange(0, PADDED * MOST)
        written = (at < CHUNKS * MOST) & (at % MOST < count - 1)
        x = tl.load(values + row * (CHUNKS * MOST) + at, mask=written, other=-float("inf"))
        member = tl.load(ids + row * (CHUNKS * MOST) + at, mask=written, other=NOWHERE)
        for number in range(0, count - 1):
            value, first = first_best(x, member)
            here = (place == number) & (first < NOWHERE)
            best, best_value = tl.where(here, first, best), tl.where(here, _less(value, total), best_value)
            x, member = _without(first, x, member)
        position = tl.load(sample_position + row)
        in_prompt = position < tl.load(asked)
        following = tl.load(slots + HISTORY_AT + slot * HISTORY + position, mask=in_prompt, other=0)
        token = tl.where(in_prompt, following, tl.load(sampled + row))
        own = _less(logits_at(logits + row.to(tl.int64) * V + token, (token >= 0) & (token < V)), total)
    tl.store(top_ids + row * MOST + place, best)
    tl.store(top_values + row * MOST + place, best_value)
    tl.store(chosen + row, own)
