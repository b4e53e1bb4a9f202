"""Experts of many tokens: assignments are put in the order of their experts, in tiles that each belong to one expert.

A place is a row in that order. The places of an expert begin at a multiple of a tile's; those behind its last
assignment are empty. Everything is counted on the device, under a fixed grid.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.moe.gemv_triton import gated


@triton.jit
def count(experts, counts, assignments, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """counts[e], of program e: how many assignments go to expert e."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    found = tl.zeros((BLOCK,), tl.int32)
    for begin in tl.range(0, assignments, BLOCK):
        a = begin + tl.arange(0, BLOCK)
        found += (tl.load(experts + a, mask=a < assignments, other=-1) == tl.program_id(0)).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(found))


@triton.jit
def align(  # type: ignore[no-untyped-def]
    experts,
    counts,
    order,
    places,
    owners,
    used,
    assignments,
    X: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program e finds the places of expert e. order [places]: the assignment there, or -1; places [assignments]: where
    each is; owners [tiles]: the expert of each; used [1]: places in use."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    e = tl.program_id(0)
    lane, step = tl.arange(0, triton.next_power_of_2(X)), tl.arange(0, BLOCK)
    spaces = tl.cdiv(tl.load(counts + lane, mask=lane < X, other=0), TILE) * TILE
    first = tl.sum(tl.where(lane < e, spaces, 0))
    space = tl.sum(tl.where(lane == e, spaces, 0))
    if e == X - 1:
        tl.store(used, first + space)
    for begin in tl.range(0, space // TILE, BLOCK):
        tl.store(owners + first // TILE + begin + step, e, mask=begin + step < space // TILE)
    at = first
    if space > 0:
        for begin in tl.range(0, assignments, BLOCK):
            own = tl.load(experts + begin + step, mask=begin + step < assignments, other=-1) == e
            place = at + tl.cumsum(own.to(tl.int32), 0) - 1
            tl.store(order + place, begin + step, mask=own)
            tl.store(places + begin + step, place, mask=own)
            at += tl.sum(own.to(tl.int32))
    for begin in tl.range(at, first + space, BLOCK):
        tl.store(order + begin + step, -1, mask=begin + step < first + space)


@triton.jit
def gather(  # type: ignore[no-untyped-def]
    x,
    order,
    used,
    sorted,
    E: tl.constexpr,
    CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """sorted[p] = x of the token at place p. Empty places are zero."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS < tl.load(used):
        inside = p < tl.load(used)
        a = tl.load(order + p, mask=inside, other=-1)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        source = x + (tl.maximum(a, 0) // CHOSEN).to(tl.int64)[:, None] * E + column
        row = tl.load(source, mask=(a >= 0)[:, None] & (column < E), other=0.0)
        tl.store(sorted + p.to(tl.int64)[:, None] * E + column, row, mask=inside[:, None] & (column < E))


@triton.jit
def multiply(  # type: ignore[no-untyped-def]
    x,
    w,
    bias,
    y,
    order,
    owners,
    used,
    tiles,
    N: tl.constexpr,
    K: tl.constexpr,
    CHOSEN: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[place] = w[its expert] @ x, with ACT gated: ROWS rows of w by a tile of places. w: [X,N,K]; bias: [X,N], None.

    x is in the order of tokens where CHOSEN > 0, and of places otherwise. Neighbouring programs share a stretch of w
    for GROUP tiles, so that it stays in the L2. Under 64 places the rows of w are the tall operand.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    in_group = GROUP * ((N + ROWS - 1) // ROWS)
    top = pid // in_group * GROUP
    height = tl.minimum(tiles - top, GROUP)
    tile = top + pid % in_group % height
    first = pid % in_group // height * ROWS
    if tile * TILE < tl.load(used):
        expert = tl.load(owners + tile).to(tl.int64)
        place = tile * TILE + tl.arange(0, TILE)
        n = first + tl.arange(0, ROWS)
        row = tl.minimum(n, N - 1)
        if ACT != "":
            row = (row % 2) * (N // 2) + row // 2
        source = place
        if CHOSEN > 0:
            source = tl.maximum(tl.load(order + place), 0) // CHOSEN
        x_start = x + source.to(tl.int64)[:, None] * K
        w_start = w + (expert * N + row)[:, None] * K
        acc = tl.zeros((ROWS, TILE) if TILE < 64 else (TILE, ROWS), tl.float32)
        for k in tl.range(0, K, COLUMNS, num_stages=STAGES):
            column = k + tl.arange(0, COLUMNS)[None, :]
            if K % COLUMNS == 0:
                x_tile, w_tile = tl.load(x_start + column), tl.load(w_start + column)
            else:
                x_tile = tl.load(x_start + column, mask=column < K, other=0.0)
                w_tile = tl.load(w_start + column, mask=column < K, other=0.0)
            if TILE < 64:
                acc = tl.dot(w_tile, tl.trans(x_tile), acc, input_precision="ieee")
            else:
                acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")
        if TILE < 64:
            acc = tl.trans(acc)
        if bias is not None:
            acc += tl.load(bias + expert * N + row).to(tl.float32)[None, :]
        to = place.to(tl.int64)[:, None]
        if ACT == "":
            tl.store(y + to * N + n[None, :], acc, mask=(n < N)[None, :])
        else:
            f = first // 2 + tl.arange(0, ROWS // 2)[None, :]
            gate, up = tl.split(tl.reshape(acc, (TILE, ROWS // 2, 2)))
            tl.store(y + to * (N // 2) + f, gated(gate, up, ACT, LIMIT, ALPHA), mask=f < N // 2)


@triton.jit
def combine(  # type: ignore[no-untyped-def]
    each,
    weights,
    places,
    y,
    E: tl.constexpr,
    CHOSEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[t] = the sum, in the order of the token's experts, of weight * each[place]. Program (t, i): COLUMNS of it."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for i in tl.static_range(CHOSEN):
        place = tl.load(places + t * CHOSEN + i).to(tl.int64)
        row = tl.load(each + place * E + column, mask=column < E, other=0.0)
        total += tl.load(weights + t * CHOSEN + i) * row.to(tl.float32)
    tl.store(y + t.to(tl.int64) * E + column, total, mask=column < E)
