"""Which experts each token goes to: the best few of a row of scores, one after another, nothing is sorted."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _order(x):  # type: ignore[no-untyped-def]
    """Integers ordered as the floats are, all above TAKEN; what is not a number counts as minus infinity."""
    x = tl.where(x == 0, 0.0, tl.where(x == x, x, float("-inf")))
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


TAKEN = tl.constexpr(-(2**31))


@triton.jit
def _groups(by, lane, ROWS: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """How good each group of SIZE experts is: the sum of its best TOP. [ROWS,LANES] -> order [ROWS,GROUPS padded]."""
    PADDED: tl.constexpr = triton.next_power_of_2(GROUPS)
    at = tl.arange(0, PADDED)[None, :]
    keys = tl.full((ROWS, PADDED), TAKEN, tl.int32)
    for g in tl.static_range(GROUPS):
        own = tl.where(lane // SIZE == g, by, float("-inf"))
        total = tl.max(own, 1)
        if TOP == 2:
            first = tl.argmax(own, 1)
            total += tl.max(tl.where(lane == first[:, None], float("-inf"), own), 1)
        keys = tl.where(at == g, _order(total)[:, None], keys)
    return keys


@triton.jit
def _within(  # type: ignore[no-untyped-def]
    by, lane, ROWS: tl.constexpr, LANES: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    TOP: tl.constexpr,
):  # fmt: skip
    """The order of what is in the KEPT best groups, and TAKEN elsewhere."""
    by = tl.maximum(by, -3.4028234663852886e38)
    keys = _groups(by, lane, ROWS, SIZE, GROUPS, TOP)
    at = tl.arange(0, triton.next_power_of_2(GROUPS))[None, :]
    order = tl.full((ROWS, LANES), TAKEN, tl.int32)
    for _ in tl.static_range(KEPT):
        best = tl.argmax(keys, 1)[:, None]
        order = tl.where(lane // SIZE == best, _order(by), order)
        keys = tl.where(at == best, TAKEN, keys)
    return order


@triton.jit
def route(  # type: ignore[no-untyped-def]
    scores,
    bias,
    experts,
    weights,
    tokens,
    X: tl.constexpr,
    ROWS: tl.constexpr,
    CHOSEN: tl.constexpr,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP: tl.constexpr,
    FACTOR: tl.constexpr,
    PDL: tl.constexpr,
):
    """The op `route`, ROWS tokens a program. scores: [tokens,X]; bias: [X] or None; the others [tokens,CHOSEN]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    LANES: tl.constexpr = triton.next_power_of_2(X)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)[None, :]
    inside = (t < tokens)[:, None] & (lane < X)
    raw = tl.load(scores + t.to(tl.int64)[:, None] * X + lane, mask=inside, other=float("-inf"))
    values = raw
    if SCORE == "softmax":
        values = tl.exp(raw - tl.max(raw, 1)[:, None])
        values = values / tl.sum(values, 1)[:, None]
    elif SCORE == "sigmoid":
        values = 1.0 / (1.0 + tl.exp(-raw))
    by = raw
    if bias is not None:
        by = values + tl.load(bias + lane, mask=lane < X, other=0.0)
    elif TOP == 2:
        by = values
    by = tl.where(by == by, by, float("-inf"))
    order = _order(by)
    if GROUPS > 0:
        order = _within(by, lane, ROWS, LANES, X // GROUPS, GROUPS, KEPT, TOP)
    order = tl.where(lane < X, order, TAKEN)
    PADDED: tl.constexpr = triton.next_power_of_2(CHOSEN)
    at = tl.arange(0, PADDED)[None, :]
    chosen = tl.zeros((ROWS, PADDED), tl.int32)
    found = tl.full((ROWS, PADDED), float("-inf"), tl.float32)
    for i in tl.static_range(CHOSEN):
        best = tl.argmax(order, 1)[:, None]
        here = lane == best
        value = tl.sum(tl.where(here, values, 0.0), 1)[:, None]
        chosen, found = tl.where(at == i, best, chosen), tl.where(at == i, value, found)
        order = tl.where(here, TAKEN, order)
    if SCORE == "top_softmax":
        found = tl.exp(found - tl.max(found, 1)[:, None])
        found = found / tl.sum(found, 1)[:, None]
    used = tl.where(at < CHOSEN, found, 0.0)
    if RENORMALIZE == 1:
        found = found / (tl.sum(tl.abs(used), 1)[:, None] + 1e-20)
    elif RENORMALIZE == 2:
        found = found / (tl.sqrt(tl.sum(used * used, 1))[:, None] + 1e-20)
    to = t.to(tl.int64)[:, None] * CHOSEN + at
    keep = (t < tokens)[:, None] & (at < CHOSEN)
    tl.store(experts + to, chosen, mask=keep)
    tl.store(weights + to, found * FACTOR, mask=keep)
