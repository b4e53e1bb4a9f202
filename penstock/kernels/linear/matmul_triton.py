"""Tensor-core products: `skinny` with the weights as the tall operand, and `tiled` for many tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.activation_triton import activate
from penstock.kernels.linear.gemv_triton import prefetch


@triton.jit
def _weight_row(n, N: tl.constexpr, GATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row of w behind column n of a product: itself, or gate and up rows in turn. Past the end, the last."""
    row = tl.minimum(n, N - 1)
    if GATED:
        row = (row % 2) * (N // 2) + row // 2
    return row


@triton.jit
def _store_rows(  # type: ignore[no-untyped-def]
    acc, bias, y, t, tokens, first, N: tl.constexpr, COLUMNS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr
):
    """Bias and activation, or gate, then store acc [TOKENS,COLUMNS], columns `first` and on of a product of N."""
    start = t.to(tl.int64)[:, None]
    if not GATED:
        n = first + tl.arange(0, COLUMNS)
        if bias is not None:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if ACT != "":
            acc = activate(acc, ACT)
        tl.store(y + start * N + n[None, :], acc, mask=(t < tokens)[:, None] & (n < N)[None, :])
    else:
        f = first // 2 + tl.arange(0, COLUMNS // 2)
        gate, up = tl.split(tl.reshape(acc, (acc.shape[0], COLUMNS // 2, 2)))
        inside = (t < tokens)[:, None] & (f < N // 2)[None, :]
        tl.store(y + start * (N // 2) + f[None, :], activate(gate, ACT) * up, mask=inside)


@triton.jit
def _joined(acc, parts, counters, t, tokens, n, N: tl.constexpr, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Leave this program's share of the tile in parts f32[SPLIT,tokens,N]; (is it the last to come, the sum of all).

    The sum is taken in the order of the split, whoever comes last, so it is the same in every run. The counter of the
    tile is zero again afterwards.
    """
    inside = (t < tokens)[None, :] & (n < N)[:, None]
    at = t.to(tl.int64)[None, :] * N + n[:, None]
    size = tokens.to(tl.int64) * N
    tl.store(parts + tl.program_id(1) * size + at, acc, mask=inside)
    tl.debug_barrier()  # all threads' stores stand before the one thread's release
    counter = counters + tl.program_id(0)
    last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1
    if last:
        acc = tl.zeros(acc.shape, tl.float32)
        for s in tl.static_range(SPLIT):
            # Past the L1, which knows nothing of what other multiprocessors wrote.
            acc += tl.load(parts + s * size + at, mask=inside, other=0.0, cache_modifier=".cg")
        tl.atomic_xchg(counter, 0, sem="relaxed")
    return last, acc


@triton.jit
def skinny(  # type: ignore[no-untyped-def]
    x,
    w,
    bias,
    y,
    parts,
    counters,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = act(x @ w.T + bias) for tokens <= TOKENS, or where GATED act(gate) * up.

    x: [tokens,K]; w: [N,K]; bias: [N] or None.

    With SPLIT > 1 program (i, s) sums the s-th share of K into parts f32[SPLIT,tokens,N]; the last to come of a tile,
    by `counters` i32[tiles], adds them up.
    """
    first = tl.program_id(0) * ROWS
    n = first + tl.arange(0, ROWS)
    t = tl.arange(0, TOKENS)
    w_start = w + _weight_row(n, N, GATED).to(tl.int64)[:, None] * K
    x_start = x + t[:, None] * K
    SHARE: tl.constexpr = (K + COLUMNS * SPLIT - 1) // (COLUMNS * SPLIT) * COLUMNS
    low = tl.program_id(1) * SHARE
    if PDL:
        if PREFETCH > 0:
            LINE: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
            prefetch(w_start + tl.minimum(low + tl.arange(0, PREFETCH)[None, :] * LINE, K - 1))
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for k in tl.range(low, tl.minimum(low + SHARE, K), COLUMNS, num_stages=STAGES):
        column = k + tl.arange(0, COLUMNS)[None, :]
        if SHARE * SPLIT == K:
            w_tile = tl.load(w_start + column, eviction_policy="evict_first")
        else:
            w_tile = tl.load(w_start + column, mask=column < K, other=0.0, eviction_policy="evict_first")
        x_tile = tl.load(x_start + column, mask=(t < tokens)[:, None] & (column < K), other=0.0)
        acc = tl.dot(w_tile, tl.trans(x_tile), acc, input_precision="ieee")
    whole = True
    if SPLIT > 1:
        whole, acc = _joined(acc, parts, counters, t, tokens, n, N, SPLIT)
    if whole:
        _store_rows(tl.trans(acc), bias, y, t, tokens, first, N, ROWS, ACT, GATED)


@triton.jit
def tiled(  # type: ignore[no-untyped-def]
    x,
    w,
    bias,
    y,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = act(x @ w.T + bias), or where GATED act(gate) * up, in tiles of TOKENS x ROWS.

    x: [tokens,K]; w: [N,K]; bias: [N] or None.

    Neighbouring programs share GROUP tiles of tokens, so that what they read stays in the L2.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    down = tl.cdiv(tokens, TOKENS)
    in_group = GROUP * tl.cdiv(N, ROWS)
    top = pid // in_group * GROUP
    height = tl.minimum(down - top, GROUP)
    t = (top + pid % in_group % height) * TOKENS + tl.arange(0, TOKENS)
    first = pid % in_group // height * ROWS
    n = first + tl.arange(0, ROWS)
    x_start = x + tl.minimum(t, tokens - 1).to(tl.int64)[:, None] * K
    w_start = w + _weight_row(n, N, GATED).to(tl.int64)[:, None] * K
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    for k in tl.range(0, K, COLUMNS, num_stages=STAGES):
        column = k + tl.arange(0, COLUMNS)[None, :]
        if K % COLUMNS == 0:
            x_tile, w_tile = tl.load(x_start + column), tl.load(w_start + column)
        else:
            x_tile = tl.load(x_start + column, mask=column < K, other=0.0)
            w_tile = tl.load(w_start + column, mask=column < K, other=0.0)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")
    _store_rows(acc, bias, y, t, tokens, first, N, ROWS, ACT, GATED)
