"""Rows of a weight matrix times up to eight vectors. Memory-bound: every weight is read once, in 16-byte pieces.

A normalisation between two products costs no launch of its own: rms_norm(r) * g = (r g) / rms(r), so the first product
writes r, r g, and each program's share of the sum of r^2 (`into_residual`), and the second scales its sums by
`norm_scale`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.activation_triton import activate


@triton.jit
def prefetch(lines):  # type: ignore[no-untyped-def]
    """Ask for the cache lines at these addresses. For weights, which no kernel of a step writes: before the wait."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [lines.to(tl.uint64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def products(w_tile, x_tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[ROWS,COLUMNS] x [COLUMNS] -> [ROWS,COLUMNS/LANE], summed over the LANE neighbours that one thread loaded.

    No data moves between threads, and one token costs COLUMNS/LANE accumulators, so eight fit in the registers.
    """
    each = w_tile * x_tile.to(tl.float32)[None, :]
    return tl.sum(tl.reshape(each, (ROWS, COLUMNS // LANE, LANE)), 2)


@triton.jit
def norm_scale(squares, PARTS: tl.constexpr, E: tl.constexpr, EPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """1 / rms of rows of E numbers, from shares of their sums of squares: [ROWS,PARTS] -> [ROWS]."""
    return tl.rsqrt(tl.sum(squares, 1) / E + EPS)


@triton.jit
def into_residual(sums, residual, gain, y, scaled, at, n, inside, OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store y = sums + residual and scaled = y * (gain + OFFSET); returns y^2 as rounded, zero outside.

    `at` says where each sum stands in residual, y and scaled, `n` where its gain is.
    """
    rounded = (sums + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(y.dtype.element_ty)
    tl.store(y + at, rounded, mask=inside)
    total = rounded.to(tl.float32)
    tl.store(scaled + at, total * (tl.load(gain + n, mask=inside, other=0.0).to(tl.float32) + OFFSET), mask=inside)
    return tl.where(inside, total * total, 0.0)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    sums, bias, y, token, n, row, active, N: tl.constexpr, ROWS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr
):
    """Bias and activation, or gate, and store one token's ROWS sums."""
    if bias is not None:
        sums += tl.load(bias + row, mask=n < N, other=0.0).to(tl.float32)
    if not GATED:
        if ACT != "":
            sums = activate(sums, ACT)
        tl.store(y + token * N + n, sums, mask=(n < N) & active)
    else:
        gate, up = tl.split(tl.reshape(sums, (ROWS // 2, 2)))
        f = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        tl.store(y + token * (N // 2) + f, activate(gate, ACT) * up, mask=(f < N // 2) & active)


@triton.jit
def gemv(  # type: ignore[no-untyped-def]
    x,
    w,
    bias,
    squares,
    residual,
    gain,
    y,
    scaled,
    shares,
    tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PREFETCH: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    """y = act(x @ w.T + bias), or where GATED act(gate) * up of its halves. x: [tokens,K]; w: [N,K]; bias: [N] or None.

    tokens <= TOKENS, a power of two. Where GATED a program owns the gate and up rows of ROWS/2 results, interleaved.
    squares f32[tokens,PARTS]: x @ w.T is divided by the root of their rows' means over K. residual [tokens,N]:
    y = x @ w.T + residual, scaled = y * (gain + OFFSET), and shares f32[tokens,programs] gets sums of y^2.
    """
    pid = tl.program_id(0)
    n = pid * ROWS + tl.arange(0, ROWS)
    LANE: tl.constexpr = 128 // w.dtype.element_ty.primitive_bitwidth
    row = tl.minimum(n, N - 1)
    if GATED:
        row = (row % 2) * (N // 2) + row // 2
    if PDL:
        if PREFETCH > 0:
            # The first lines of the program's first rows, which lie one after another; short of the matrix's end.
            at = tl.min(row, 0).to(tl.int64) * K + tl.arange(0, PREFETCH) * (LANE * 8)
            prefetch(w + tl.minimum(at, (N * K - 1)))
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start = w + row.to(tl.int64)[:, None] * K
    zero = tl.zeros((ROWS, COLUMNS // LANE), tl.float32)
    acc = (zero,) * TOKENS
    if squares is not None:  # asked for early, and used when the sums are done
        PADDED: tl.constexpr = triton.next_power_of_2(PARTS)
        part = tl.arange(0, PADDED)[None, :]
        token = tl.arange(0, TOKENS)[:, None]
        norms = tl.load(squares + token * PARTS + part, mask=(part < PARTS) & (token < tokens), other=0.0)
    for k in tl.range(0, K, COLUMNS, num_stages=1):
        column = k + tl.arange(0, COLUMNS)
        if K % COLUMNS == 0:
            tile = tl.load(start + column[None, :], eviction_policy="evict_first")
        else:
            tile = tl.load(start + column[None, :], mask=column[None, :] < K, other=0.0, eviction_policy="evict_first")
        wide = tile.to(tl.float32)
        new = ()
        for t in tl.static_range(TOKENS):
            vector = tl.load(x + t * K + column, mask=(column < K) & (t < tokens), other=0.0)
            # Triton knows no starred tuples.
            new = new + (acc[t] + products(wide, vector, ROWS, COLUMNS, LANE),)  # type: ignore[assignment]  # noqa: RUF005
        acc = new
    if squares is not None:
        scale = norm_scale(norms, PARTS, K, EPS)
    for t in tl.static_range(TOKENS):
        sums = tl.sum(acc[t], 1)
        if squares is not None:
            sums *= tl.sum(tl.where(tl.arange(0, TOKENS) == t, scale, 0.0))
        if residual is not None:
            inside = (n < N) & (t < tokens)
            square = into_residual(sums, residual, gain, y, scaled, t * N + n, n, inside, OFFSET)
            tl.store(shares + t * tl.num_programs(0) + pid, tl.sum(square), mask=t < tokens)
        else:
            _finish(sums, bias, y, t, n, row, t < tokens, N, ROWS, ACT, GATED)
