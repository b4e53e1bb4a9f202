"""Choosing the next token without sorting, in two launches.

1. `survey` reads the logits, the vocabulary split over programs. It leaves each chunk's best token; of rows that filter
   also the largest logit of each *group* of a few tokens, and with top_p alone the mass exp(logit - peak).
2. `choose` finishes each row in one program:
   * Rows that filter nothing take the best of the chunks' best tokens.
   * A small top_k: the k-th largest token is at least the k-th largest group maximum, so few groups can hold what is
     kept. They are listed, and the k-th largest of their tokens is found by search over the bits of floats.
   * Otherwise the best token of all, perturbed, is drawn again until it is one of those kept. Only tokens above the
     last one drawn can still win, so each draw leaves a uniform share of the mass above it: few draws for any top_p.
     Here too only the groups that reach above the first draw are listed and read.
   * min_p is an edge that is known at once, a little below the largest: what is drawn below it is drawn again from it.

Rows are told apart by their temperature, top_k, top_p and min_p on the device; both launches run for every row. A
logit that is not a number counts as minus infinity: no search below ever meets one, and each ends whatever it is given.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.sample.row_triton import (
    NOWHERE,
    filters_of,
    first_best,
    float_of,
    logits_at,
    mass_of,
    noise_key,
    noise_of,
    order_of,
    quad_of,
    scaled_by,
)

LOWEST = tl.constexpr(-2139095041)  # minus infinity, in the order of `order_of`
FIELD = tl.constexpr(20)  # bits of a count, more than a vocabulary needs; three of them are summed at once
TWO = tl.constexpr(40)
MASK = tl.constexpr((1 << 20) - 1)


@triton.jit
def survey(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    best,
    where,
    peaks,
    masses,
    maxima,
    V: tl.constexpr,
    LANES: tl.constexpr,
    SIZE: tl.constexpr,
    NATIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    """By chunk: its best token, perturbed where the row samples; its peak, and its mass relative to that; the maximum
    of each of its groups. best, where, peaks, masses: [L,chunks]; maxima: [L,groups]. Only what is used is written."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk, row = tl.program_id(0), tl.program_id(1)
    group = chunk * LANES + tl.arange(0, LANES)
    token = quad_of(group[None, :], tl.arange(0, SIZE // 4)[:, None], LANES, SIZE)[:, :, None] + tl.arange(0, 4)
    score = logits_at(logits + row.to(tl.int64) * V + token, token < V)
    hot, k, p, _, filters, small = filters_of(temperature, top_k, top_p, min_p, row, V)
    at = row * tl.num_programs(0) + chunk
    if filters:
        most = scaled_by(tl.max(tl.max(score, 2), 0), hot)
        tl.store(maxima + at.to(tl.int64) * LANES + tl.arange(0, LANES), most)
    if small == 0:
        if hot > 0:
            score = scaled_by(score, hot)
            if (k == 0) & (p < 1):
                peak = tl.max(score)
                tl.store(peaks + at, peak)
                tl.store(masses + at, tl.sum(mass_of(score, peak)))
            score += noise_of(noise_key(seed, position, row), token, NATIVE)
        value, first = first_best(score, tl.where(token < V, token, NOWHERE))
        tl.store(best + at, value)
        tl.store(where + at, first)


@triton.jit
def _list(maxima, edge, lists):  # type: ignore[no-untyped-def]
    """List the groups whose maxima reach `edge`, in order; their number."""
    mine = (maxima >= edge).to(tl.int32)
    tl.store(lists + tl.cumsum(mine, 0) - 1, tl.arange(0, maxima.shape[0]), mask=mine > 0)
    tl.debug_barrier()  # what a thread reads of the list, another wrote
    return tl.sum(mine, 0)


@triton.jit
def _block(  # type: ignore[no-untyped-def]
    lists, start, end, source, hot, V: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr, QUADS: tl.constexpr
):
    """(logits, numbers) [QUADS,4] of the listed tokens from part `start`; behind part `end` minus infinity, NOWHERE."""
    number = start + tl.arange(0, QUADS)
    group = tl.load(lists + number // (SIZE // 4), mask=number < end, other=0)
    token = quad_of(group, number % (SIZE // 4), LANES, SIZE)[:, None] + tl.arange(0, 4)[None, :]
    inside = (number < end)[:, None] & (token < V)
    return scaled_by(logits_at(source + token, inside), hot), tl.where(inside, token, NOWHERE)


@triton.jit
def _reach(x, a, b, c):  # type: ignore[no-untyped-def]
    """One in each of three fields whose edge x, in the order of bits, reaches."""
    return (x >= a).to(tl.int64) + ((x >= b).to(tl.int64) << FIELD) + ((x >= c).to(tl.int64) << TWO)


@triton.jit
def _mean(low, high):  # type: ignore[no-untyped-def]
    """Rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _narrow(reached, k, a, b, c, low, count, high):  # type: ignore[no-untyped-def]
    """One step of a search for the k-th largest between `low` and `high`, which three edges cut into four parts.

    Whatever is counted, less is left between them where low < b < high: such searches end after at most 32 steps.
    """
    in_a, in_b = (reached & MASK).to(tl.int32), ((reached >> FIELD) & MASK).to(tl.int32)
    in_c = (reached >> TWO).to(tl.int32)
    high = tl.where(in_c >= k, high, tl.where(in_b >= k, c, tl.where(in_a >= k, b, a)))
    low = tl.where(in_c >= k, c, tl.where(in_b >= k, b, tl.where(in_a >= k, a, low)))
    count = tl.where(in_c >= k, in_c, tl.where(in_b >= k, in_b, tl.where(in_a >= k, in_a, count)))
    return low, count, high


@triton.jit
def _floor(maxima, k, ceiling, ENOUGH: tl.constexpr):  # type: ignore[no-untyped-def]
    """An edge at or below the k-th largest token, that ENOUGH groups reach, or not many more than k. Minus
    infinity, if there are fewer groups than k."""
    low, high = tl.full((), LOWEST, tl.int32), ceiling
    count = tl.sum((maxima >= low).to(tl.int32), 0)
    # First of all the least of the maxima of several groups each: close to the largest, and many groups reach it.
    several = tl.max(tl.reshape(maxima, (maxima.shape[0] // 16, 16)), 1)
    a = tl.min(tl.where(several > LOWEST, several, ceiling - 1), 0)
    b = _mean(a, high)
    c = _mean(b, high)
    while (count > tl.maximum(k + k // 4, ENOUGH)) & (low + 1 < high):
        reached = tl.sum(_reach(maxima, a, b, c), 0)
        low, count, high = _narrow(reached, k, a, b, c, low, count, high)
        b = _mean(low, high)
        a, c = _mean(low, b), _mean(b, high)
    return low


@triton.jit
def _folded(x, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Summed to WIDTH numbers, within threads."""
    return tl.sum(tl.reshape(x, (x.shape[0] // WIDTH, WIDTH)), 0)


@triton.jit
def _kth(  # type: ignore[no-untyped-def]
    x, lists, end, source, hot, k, low, ceiling, V: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr,
    HELD: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """The k-th largest of the listed tokens, or an edge below it that no further token reaches."""
    count, high = end * 4, ceiling
    while (count > k) & (low + 1 < high):
        b = _mean(low, high)
        a, c = _mean(low, b), _mean(b, high)
        reached = tl.sum(_reach(order_of(x), a, b, c), 1)
        for start in range(HELD, end, QUADS):
            y, _ = _block(lists, start, end, source, hot, V, LANES, SIZE, QUADS)
            reached += _folded(tl.sum(_reach(order_of(y), a, b, c), 1), HELD)
        low, count, high = _narrow(tl.sum(reached, 0), k, a, b, c, low, count, high)
    return low


@triton.jit
def _above(x, token, edge, top):  # type: ignore[no-untyped-def]
    """How many of each four of these tokens reach `edge`, and their mass."""
    above = (token < NOWHERE) & (order_of(x) >= edge)
    return tl.sum(above.to(tl.int32), 1), tl.sum(tl.where(above, mass_of(x, top), 0.0), 1)


@triton.jit
def _tally(  # type: ignore[no-untyped-def]
    x, token, lists, end, source, hot, edge, top, V: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr,
    HELD: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """How many of the listed tokens reach `edge`, and their mass."""
    count, mass = _above(x, token, edge, top)
    for start in range(HELD, end, QUADS):
        y, other = _block(lists, start, end, source, hot, V, LANES, SIZE, QUADS)
        more, heavier = _above(y, other, edge, top)
        count += _folded(more, HELD)
        mass += _folded(heavier, HELD)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _drawn(x, token, edge, key, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The best of these tokens that reach `edge`, perturbed: (its score, it)."""
    reaches = order_of(x) >= edge
    score = tl.where(reaches, x + noise_of(key, token, NATIVE), -float("inf"))
    return first_best(score, tl.where(reaches, token, NOWHERE))


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    x, token, lists, end, source, hot, edge, key, V: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr,
    HELD: tl.constexpr, QUADS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The best of the listed tokens that reach `edge`, perturbed."""
    score, best = _drawn(x, token, edge, key, NATIVE)
    for start in range(HELD, end, QUADS):
        y, other = _block(lists, start, end, source, hot, V, LANES, SIZE, QUADS)
        rival, first = _drawn(y, other, edge, key, NATIVE)
        better = (rival > score) | ((rival == score) & (first < best))
        score, best = tl.where(better, rival, score), tl.where(better, first, best)
    return tl.minimum(best, V - 1)


@triton.jit
def _again(  # type: ignore[no-untyped-def]
    token, drawn, x, member, lists, end, source, hot, k, p, least, mass, edge, top, key, V: tl.constexpr,
    LANES: tl.constexpr, SIZE: tl.constexpr, HELD: tl.constexpr, QUADS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Draw until the token is one of those kept, none below `least`; the first is `token`, if it is `drawn` already."""
    more = True
    left = tl.full((), NOWHERE, tl.int32)
    while more:
        if drawn == 0:
            token = _draw(x, member, lists, end, source, hot, edge, key, V, LANES, SIZE, HELD, QUADS, NATIVE)
        drawn = False
        # Should this token not be one of those kept, only those above it can be.
        own = order_of(scaled_by(logits_at(source + token, token < V), hot))
        edge = tl.maximum(edge, tl.maximum(own + 1, least))
        above, held = _tally(x, member, lists, end, source, hot, edge, top, V, LANES, SIZE, HELD, QUADS)
        # Each draw leaves fewer above it, so there are at most V.
        rejected = (own < least) | ((k > 0) & (above >= k)) | ((p < 1) & (held >= p * mass))
        more = (above > 0) & (above < left) & rejected
        left = above
    return token


@triton.jit
def _filtered(  # type: ignore[no-untyped-def]
    token, logits, maxima, lists, peaks, masses, row, hot, k, p, floor, small, key,
    V: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr,
    HELD: tl.constexpr, QUADS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The token of a row that filters. `token`: the best of all, perturbed, unless top_k is small."""
    source = logits + row.to(tl.int64) * V
    groups = row.to(tl.int64) * (CHUNKS * LANES)
    group = tl.arange(0, PADDED * LANES)
    there = group < CHUNKS * LANES
    most = order_of(tl.load(maxima + groups + group, mask=there, other=-float("inf")))
    most = tl.where(there, most, LOWEST - 1)  # in no list, whatever its edge
    ceiling = tl.max(most, 0) + 1
    top = float_of(ceiling - 1)
    least = tl.minimum(order_of(top + tl.log(tl.minimum(floor, 1.0))), ceiling - 1)
    least = tl.where(floor > 0, least, LOWEST)
    lists += groups
    mass = tl.full((), 0.0, tl.float32)
    if k == 0:
        chunk = tl.arange(0, PADDED)
        at = row * CHUNKS + chunk
        peak = tl.load(peaks + at, mask=chunk < CHUNKS, other=-float("inf"))
        mass = tl.sum(tl.load(masses + at, mask=chunk < CHUNKS, other=0.0) * mass_of(peak, top), 0)
    cuts = (k > 0) & (small | (p < 1))  # the k-th largest has to be known
    edge = tl.full((), LOWEST, tl.int32)
    if cuts:
        edge = _floor(most, k, ceiling, HELD // (SIZE // 4))
    else:
        edge = tl.maximum(order_of(scaled_by(logits_at(source + token, token < V), hot)) + 1, least)
    end = _list(most, edge, lists) * (SIZE // 4)
    # The first parts stay in registers; what lies behind them is read anew each time.
    x, member = _block(lists, 0, end, source, hot, V, LANES, SIZE, HELD)
    if cuts:
        edge = _kth(x, lists, end, source, hot, k, edge, ceiling, V, LANES, SIZE, HELD, QUADS)
        _, mass = _tally(x, member, lists, end, source, hot, edge, top, V, LANES, SIZE, HELD, QUADS)
    return _again(
        token, small == 0, x, member, lists, end, source, hot, k, p, least, mass, tl.maximum(edge, least), top, key,
        V, LANES, SIZE, HELD, QUADS, NATIVE,
    )  # fmt: skip


@triton.jit
def choose(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    best,
    where,
    peaks,
    masses,
    maxima,
    lists,
    out,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    LANES: tl.constexpr,
    SIZE: tl.constexpr,
    HELD: tl.constexpr,
    QUADS: tl.constexpr,
    NATIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [L]: the chosen tokens. One program for each row. PADDED: CHUNKS rounded up to a power of two.

    lists: [L,groups]. Listed tokens are counted in parts, of four each.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    hot, k, p, floor, filters, small = filters_of(temperature, top_k, top_p, min_p, row, V)
    key = noise_key(seed, position, row)
    token = tl.full((), V - 1, tl.int32)
    if small == 0:
        chunk = tl.arange(0, PADDED)
        at = row * CHUNKS + chunk
        score = tl.load(best + at, mask=chunk < CHUNKS, other=-float("inf"))
        _, first = first_best(score, tl.load(where + at, mask=chunk < CHUNKS, other=NOWHERE))
        token = tl.minimum(first, V - 1)
    if filters:
        token = _filtered(
            token, logits, maxima, lists, peaks, masses, row, hot, k, p, floor, small, key,
            V, CHUNKS, PADDED, LANES, SIZE, HELD, QUADS, NATIVE,
        )  # fmt: skip
    tl.store(out + row, token)
