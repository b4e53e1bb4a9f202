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

Rows are told apart by their temperature, top_k and top_p on the device; both launches run for every row.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(2147483647)
LOWEST = tl.constexpr(-2139095041)  # minus infinity, in the order of `_ordered`
FEW = tl.constexpr(256)  # a top_k up to this is small
FIELD = tl.constexpr(20)  # bits of a count, more than a vocabulary needs; three of them are summed at once
TWO = tl.constexpr(40)
MASK = tl.constexpr((1 << 20) - 1)


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """The finaliser of the reference, in 32 bits that wrap."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _spread(x):  # type: ignore[no-untyped-def]
    return x.to(tl.uint32, bitcast=True) * 0x9E3779B9


@triton.jit
def _log2(x, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The hardware's logarithm: only absolutely accurate near 1, and without the branches of the library's."""
    if NATIVE:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def _noise(key, token, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """-log(-log(u)) of the token's draw u. Near u = 1, where winners lie, -log(u) is the series of w = 1 - u."""
    bits = _mix(key ^ _mix(_spread(token)))
    # A float in [1, 2) has 23 random bits: u is that less 1, and half a bit more, which is exact and never 0 or 1.
    u = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    w = 1.0 - u
    series = w * (1.0 + w * (0.5 + w * (0.33333333 + w * (0.25 + w * (0.2 + w * 0.16666667)))))
    return -0.6931471805599453 * _log2(tl.where(w < 0.125, series, -0.6931471805599453 * _log2(u, NATIVE)), NATIVE)


@triton.jit
def _key(seed, position, row):  # type: ignore[no-untyped-def]
    return _mix(_mix(tl.load(seed + row).to(tl.uint32, bitcast=True)) ^ _spread(tl.load(position + row)))


@triton.jit
def _filters(temperature, top_k, top_p, row, V: tl.constexpr):  # type: ignore[no-untyped-def]
    """(temperature, top_k or 0 where it keeps all, top_p, whether the row filters, whether by a small top_k)."""
    hot, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    k = tl.where((k < 0) | (k >= V), 0, k)
    filters = (hot > 0) & ((k > 0) | (p < 1))
    return hot, k, p, filters, filters & (k > 0) & (k <= FEW)


@triton.jit
def _scaled(x, hot):  # type: ignore[no-untyped-def]
    """As the reference scales: rounded as it rounds, zero without a sign so that ties are ties of bits. Monotonic."""
    x = tl.div_rn(x, tl.where(hot > 0, hot, 1.0))
    return tl.where(x == 0, 0.0, x)


@triton.jit
def _logits(logits, inside):  # type: ignore[no-untyped-def]
    return tl.load(logits, mask=inside, other=-float("inf")).to(tl.float32)


@triton.jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """Integers in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _float(ordered):  # type: ignore[no-untyped-def]
    """The float of such an integer."""
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def _first_best(score, token):  # type: ignore[no-untyped-def]
    """The largest score, and the lowest token that has it."""
    best = tl.max(score)
    return best, tl.min(tl.where(score == best, token, NOWHERE))


@triton.jit
def _mass(x, top):  # type: ignore[no-untyped-def]
    """exp(x - top), and nothing where x is minus infinity, be it the top itself."""
    return tl.where(x > -float("inf"), tl.exp(x - top), 0.0)


@triton.jit
def _quad(group, part, LANES: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first of four neighbouring tokens that are part `part` of a group. A chunk is LANES groups of SIZE tokens,
    whose parts lie side by side: what a thread reads is a group."""
    return group // LANES * (LANES * SIZE) + group % LANES * 4 + part * (LANES * 4)


@triton.jit
def survey(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
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
    token = _quad(group[None, :], tl.arange(0, SIZE // 4)[:, None], LANES, SIZE)[:, :, None] + tl.arange(0, 4)
    score = _logits(logits + row.to(tl.int64) * V + token, token < V)
    hot, k, p, filters, small = _filters(temperature, top_k, top_p, row, V)
    at = row * tl.num_programs(0) + chunk
    if filters:
        most = _scaled(tl.max(tl.max(score, 2), 0), hot)
        tl.store(maxima + at.to(tl.int64) * LANES + tl.arange(0, LANES), most)
    if small == 0:
        if hot > 0:
            score = _scaled(score, hot)
            if (k == 0) & (p < 1):
                peak = tl.max(score)
                tl.store(peaks + at, peak)
                tl.store(masses + at, tl.sum(_mass(score, peak)))
            score += _noise(_key(seed, position, row), token, NATIVE)
        value, first = _first_best(score, tl.where(token < V, token, NOWHERE))
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
    token = _quad(group, number % (SIZE // 4), LANES, SIZE)[:, None] + tl.arange(0, 4)[None, :]
    inside = (number < end)[:, None] & (token < V)
    return _scaled(_logits(source + token, inside), hot), tl.where(inside, token, NOWHERE)


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
    """One step of a search for the k-th largest between `low` and `high`, which three edges cut into four parts."""
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
        reached = tl.sum(_reach(_ordered(x), a, b, c), 1)
        for start in range(HELD, end, QUADS):
            y, _ = _block(lists, start, end, source, hot, V, LANES, SIZE, QUADS)
            reached += _folded(tl.sum(_reach(_ordered(y), a, b, c), 1), HELD)
        low, count, high = _narrow(tl.sum(reached, 0), k, a, b, c, low, count, high)
    return low


@triton.jit
def _above(x, token, edge, top):  # type: ignore[no-untyped-def]
    """How many of each four of these tokens reach `edge`, and their mass."""
    above = (token < NOWHERE) & (_ordered(x) >= edge)
    return tl.sum(above.to(tl.int32), 1), tl.sum(tl.where(above, _mass(x, top), 0.0), 1)


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
    reaches = _ordered(x) >= edge
    score = tl.where(reaches, x + _noise(key, token, NATIVE), -float("inf"))
    return _first_best(score, tl.where(reaches, token, NOWHERE))


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
def choose(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
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
    hot, k, p, filters, small = _filters(temperature, top_k, top_p, row, V)
    key = _key(seed, position, row)
    chunk = tl.arange(0, PADDED)
    at = row * CHUNKS + chunk
    token = tl.full((), V - 1, tl.int32)
    if small == 0:
        score = tl.load(best + at, mask=chunk < CHUNKS, other=-float("inf"))
        _, first = _first_best(score, tl.load(where + at, mask=chunk < CHUNKS, other=NOWHERE))
        token = tl.minimum(first, V - 1)  # never out of range, even where all is NaN
    if filters:
        source = logits + row.to(tl.int64) * V
        groups = row.to(tl.int64) * (CHUNKS * LANES)
        group = tl.arange(0, PADDED * LANES)
        there = group < CHUNKS * LANES
        most = _ordered(tl.load(maxima + groups + group, mask=there, other=-float("inf")))
        most = tl.where(there, most, LOWEST - 1)  # in no list, whatever its edge
        ceiling = tl.max(most, 0) + 1
        top = _float(ceiling - 1)
        lists += groups
        mass = tl.full((), 0.0, tl.float32)
        if k == 0:
            peak = tl.load(peaks + at, mask=chunk < CHUNKS, other=-float("inf"))
            mass = tl.sum(tl.load(masses + at, mask=chunk < CHUNKS, other=0.0) * _mass(peak, top), 0)
        cuts = (k > 0) & (small | (p < 1))  # the k-th largest has to be known
        edge = tl.full((), LOWEST, tl.int32)
        if cuts:
            edge = _floor(most, k, ceiling, HELD // (SIZE // 4))
        else:
            edge = _ordered(_scaled(tl.load(source + token).to(tl.float32), hot)) + 1
        end = _list(most, edge, lists) * (SIZE // 4)
        # The first parts stay in registers; what lies behind them is read anew each time.
        x, member = _block(lists, 0, end, source, hot, V, LANES, SIZE, HELD)
        if cuts:
            edge = _kth(x, lists, end, source, hot, k, edge, ceiling, V, LANES, SIZE, HELD, QUADS)
            _, mass = _tally(x, member, lists, end, source, hot, edge, top, V, LANES, SIZE, HELD, QUADS)
        more = True
        drawn = small == 0
        while more:
            if drawn == 0:
                token = _draw(x, member, lists, end, source, hot, edge, key, V, LANES, SIZE, HELD, QUADS, NATIVE)
            drawn = False
            # Should this token not be one of those kept, only those above it can be.
            edge = _ordered(_scaled(tl.load(source + token).to(tl.float32), hot)) + 1
            above, held = _tally(x, member, lists, end, source, hot, edge, top, V, LANES, SIZE, HELD, QUADS)
            more = (above > 0) & (((k > 0) & (above >= k)) | ((p < 1) & (held >= p * mass)))
    tl.store(out + row, token)
