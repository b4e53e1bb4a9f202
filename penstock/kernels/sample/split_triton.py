"""Choosing the next token without sorting, the vocabulary split over programs.

1. `survey`: each chunk's best token, which decides rows that are greedy or filter nothing.
2. `census`, for rows that filter: how many tokens, and how much probability, lie above each of LEVELS logits below the
   best. The levels that enclose top-k's or top-p's cut follow.
3. `gather`: the tokens above the lower of those levels, which are few unless the distribution is flat.
4. `choose`: the exact cuts, by bisection over the ordered bits of floats, then the best perturbed token of those kept.
   Where the gathered tokens overflow the list, the whole row is read instead.

Rows are told apart by their temperature, top_k and top_p on the device; every launch runs for every row.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEVELS = tl.constexpr(32)  # the last of them is minus infinity
NOWHERE = tl.constexpr(2147483647)


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
def _noise(key, token):  # type: ignore[no-untyped-def]
    """-log(-log(u)) of the token's draw u.

    The hardware's logarithm is only absolutely accurate near 1, where the winners' draws lie; there -log(u) is taken
    as 2 atanh(w / (2 - w)) of the complement w = 1 - u, which is exact.
    """
    bits = _mix(key ^ _mix(_spread(token)))
    u = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # exact, and never 0 or 1
    w = 1.0 - u
    s = w / (2.0 - w)
    q = s * s
    series = 2.0 * s * (1.0 + q * (0.333333333 + q * (0.2 + q * (0.142857143 + q * 0.111111111))))
    return -tl.log(tl.where(w < 0.25, series, -tl.log(u)))


@triton.jit
def _key(seed, position, row):  # type: ignore[no-untyped-def]
    return _mix(_mix(tl.load(seed + row).to(tl.uint32, bitcast=True)) ^ _spread(tl.load(position + row)))


@triton.jit
def _filters(temperature, top_k, top_p, row, V: tl.constexpr):  # type: ignore[no-untyped-def]
    """(temperature, top_k or 0 where it keeps all, top_p, whether the row filters)."""
    hot, k, p = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row)
    k = tl.where((k < 0) | (k >= V), 0, k)
    return hot, k, p, (hot > 0) & ((k > 0) | (p < 1))


@triton.jit
def _scaled(logits, hot, inside):  # type: ignore[no-untyped-def]
    """Logits as the reference scales them: rounded as it rounds, zero without a sign so that ties are ties of bits."""
    x = tl.load(logits, mask=inside, other=-float("inf")).to(tl.float32)
    x = tl.div_rn(x, tl.where(hot > 0, hot, 1.0))
    return tl.where(x == 0, 0.0, x)


@triton.jit
def _first_best(score, token):  # type: ignore[no-untyped-def]
    """The largest score, and the lowest token that has it."""
    best = tl.max(score, 0)
    return best, tl.min(tl.where(score == best, token, NOWHERE), 0)


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
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """best, where [L,CHUNKS]: each chunk's best token, perturbed in rows that sample and do not filter."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, chunk = tl.program_id(0), tl.program_id(1)
    hot, _, _, filters = _filters(temperature, top_k, top_p, row, V)
    key = _key(seed, position, row)
    source = logits + row.to(tl.int64) * V
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    at = tl.full((BLOCK,), NOWHERE, tl.int32)
    for start in range(0, CHUNK, BLOCK):
        token = chunk * CHUNK + start + tl.arange(0, BLOCK)
        score = _scaled(source + token, hot, token < V)
        if (hot > 0) & (filters == 0):
            score += _noise(key, token)
        better = (score > top) | ((at == NOWHERE) & (token < V))
        top, at = tl.where(better, score, top), tl.where(better, token, at)
    value, token = _first_best(top, at)
    tl.store(best + row * CHUNKS + chunk, value)
    tl.store(where + row * CHUNKS + chunk, token)


@triton.jit
def _level(best, j):  # type: ignore[no-untyped-def]
    """The logit of level j: close together below the best, 28 nats below it at last, and then minus infinity.

    The distance is exact in float32, so that every kernel gets the same bits however it is compiled.
    """
    return tl.where(j == LEVELS - 1, -float("inf"), best - (j * j).to(tl.float32) * 0.03125)


@triton.jit
def _best_of(best, row, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.max(tl.load(best + row * CHUNKS + tl.arange(0, CHUNKS)), 0)


@triton.jit
def census(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
    best,
    counts,
    masses,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """counts, masses [L,CHUNKS,LEVELS]: each chunk's tokens at or above each level, and their exp(logit - best)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, chunk = tl.program_id(0), tl.program_id(1)
    hot, _, _, filters = _filters(temperature, top_k, top_p, row, V)
    if filters:
        source = logits + row.to(tl.int64) * V
        top = _best_of(best, row, CHUNKS)
        j = tl.arange(0, LEVELS)
        level = _level(top, j)
        count = tl.zeros((LEVELS,), tl.int32)
        mass = tl.zeros((LEVELS,), tl.float32)
        for start in range(0, CHUNK, BLOCK):
            token = chunk * CHUNK + start + tl.arange(0, BLOCK)
            x = _scaled(source + token, hot, token < V)
            above = (x[:, None] >= level[None, :]) & (token < V)[:, None]
            count += tl.sum(above.to(tl.int32), 0)
            mass += tl.sum(tl.where(above, tl.exp(x - top)[:, None], 0.0), 0)
        at = (row * CHUNKS + chunk) * LEVELS + j
        tl.store(counts + at, count)
        tl.store(masses + at, mass)


@triton.jit
def _cut(counts, masses, k, p, row, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first level that reaches top_k, or without one top_p; (it, each chunk's tokens above it, the row's mass)."""
    chunk, j = tl.arange(0, CHUNKS), tl.arange(0, LEVELS)
    at = (row * CHUNKS + chunk)[:, None] * LEVELS + j[None, :]
    count = tl.load(counts + at)
    total = tl.sum(count, 0)
    mass = tl.sum(tl.load(masses + at), 0)
    whole = tl.max(mass, 0)
    reached = tl.where(k > 0, total >= k, mass >= p * whole)
    level = tl.min(tl.where(reached | (j == LEVELS - 1), j, LEVELS), 0)
    return level, tl.sum(tl.where(j[None, :] == level, count, 0), 1), whole


@triton.jit
def gather(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
    best,
    counts,
    masses,
    header,
    whole_mass,
    values,
    tokens,
    V: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """values, tokens [L,CAPACITY]: the tokens at or above the cut, in order; header [L,2]: their number, the level."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, chunk = tl.program_id(0), tl.program_id(1)
    hot, k, p, filters = _filters(temperature, top_k, top_p, row, V)
    if filters:
        source = logits + row.to(tl.int64) * V
        level, count, whole = _cut(counts, masses, k, p, row, CHUNKS)
        size = tl.sum(count, 0)
        if chunk == 0:
            tl.store(header + row * 2, size)
            tl.store(header + row * 2 + 1, level)
            tl.store(whole_mass + row, whole)
        mine = tl.sum(tl.where(tl.arange(0, CHUNKS) == chunk, count, 0), 0)
        if (size <= CAPACITY) & (mine > 0):
            floor = _level(_best_of(best, row, CHUNKS), level)
            place = row.to(tl.int64) * CAPACITY + tl.sum(tl.where(tl.arange(0, CHUNKS) < chunk, count, 0), 0)
            for start in range(0, CHUNK, BLOCK):
                token = chunk * CHUNK + start + tl.arange(0, BLOCK)
                x = _scaled(source + token, hot, token < V)
                above = (x >= floor) & (token < V)
                at = place + tl.cumsum(above.to(tl.int32), 0) - 1
                tl.store(values + at, x, mask=above)
                tl.store(tokens + at, token, mask=above)
                place += tl.sum(above.to(tl.int32), 0)


@triton.jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """Integers in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _candidates(values, source, hot, listed, at, size, CAPACITY: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of the list, or of the whole row where the list overflowed."""
    inside = at < size
    if listed:  # noqa: SIM108  (a branch of the program, not a choice between two loaded values)
        x = tl.load(values + at, mask=inside, other=-float("inf"))
    else:
        x = _scaled(source + at, hot, inside)
    return x, inside


@triton.jit
def _tally(  # type: ignore[no-untyped-def]
    values, source, hot, listed, size, edge, top, CAPACITY: tl.constexpr, BLOCK: tl.constexpr
):
    """How many candidates lie at or above `edge` in the order of bits, and their mass."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        x, inside = _candidates(values, source, hot, listed, start + tl.arange(0, BLOCK), size, CAPACITY)
        above = inside & (_ordered(x).to(tl.int64) >= edge)
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp(x - top), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


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
    header,
    whole_mass,
    values,
    tokens,
    out,
    V: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [L]: the chosen tokens. One program for each row."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    hot, k, p, filters = _filters(temperature, top_k, top_p, row, V)
    if filters == 0:
        chunk = row * CHUNKS + tl.arange(0, CHUNKS)
        _, token = _first_best(tl.load(best + chunk), tl.load(where + chunk))
        tl.store(out + row, tl.minimum(token, V - 1))  # never out of range, even where all is NaN
    else:
        top = _best_of(best, row, CHUNKS)
        size, level = tl.load(header + row * 2), tl.load(header + row * 2 + 1)
        listed = size <= CAPACITY
        size = tl.where(listed, size, V)
        source = logits + row.to(tl.int64) * V
        values += row.to(tl.int64) * CAPACITY
        tokens += row.to(tl.int64) * CAPACITY
        ceiling = _ordered(top).to(tl.int64)
        low = _ordered(_level(top, level)).to(tl.int64)
        high = tl.where(level > 0, _ordered(_level(top, level - 1)).to(tl.int64), ceiling + 1)
        mass = tl.load(whole_mass + row)
        floor = low
        if k > 0:
            while low + 1 < high:  # at least k at or above low, fewer at or above high
                middle = low + (high - low) // 2
                count, _ = _tally(values, source, hot, listed, size, middle, top, CAPACITY, BLOCK)
                low, high = tl.where(count >= k, middle, low), tl.where(count >= k, high, middle)
            floor = low
            _, mass = _tally(values, source, hot, listed, size, floor, top, CAPACITY, BLOCK)
            high = ceiling
        if p < 1:
            low = floor - 1
            high = tl.minimum(high, ceiling)
            while low + 1 < high:  # top_p or more strictly above low, less strictly above high
                middle = low + (high - low) // 2
                _, held = _tally(values, source, hot, listed, size, middle + 1, top, CAPACITY, BLOCK)
                low, high = tl.where(held < p * mass, low, middle), tl.where(held < p * mass, middle, high)
            floor = high
        key = _key(seed, position, row)
        score = tl.full((BLOCK,), -float("inf"), tl.float32)
        at = tl.full((BLOCK,), NOWHERE, tl.int32)
        for start in range(0, size, BLOCK):
            index = start + tl.arange(0, BLOCK)
            x, inside = _candidates(values, source, hot, listed, index, size, CAPACITY)
            token = index
            if listed:
                token = tl.load(tokens + index, mask=inside, other=0)
            perturbed = x + _noise(key, token)
            better = inside & (_ordered(x).to(tl.int64) >= floor) & (perturbed > score)
            score, at = tl.where(better, perturbed, score), tl.where(better, token, at)
        _, token = _first_best(score, at)
        tl.store(out + row, tl.minimum(token, V - 1))
