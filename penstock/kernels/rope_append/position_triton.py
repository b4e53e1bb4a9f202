"""Rotary embedding and the append to the cache, fused and apart. A program has one token and some of its heads."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _cos_sin(angle):
    """Cosine and sine of a float32 angle, to about 1e-7 for any angle under 2**40.

    The quarter turn is taken out in float64, three operations, so that no slow path with local memory is needed; what
    is left is within pi/4, where Taylor's series to the ninth and tenth power are exact to float32.
    """
    quarters = angle.to(tl.float64) * 0.6366197723675814  # 2 / pi
    whole = tl.floor(quarters + 0.5)
    x = ((quarters - whole) * 1.5707963267948966).to(tl.float32)  # pi / 2
    z = x * x
    s = x + x * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    c = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800)))))
    quadrant = whole.to(tl.int64).to(tl.int32) & 3
    cos = tl.where(quadrant % 2 == 0, c, s)
    sin = tl.where(quadrant % 2 == 0, s, c)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = tl.where(quadrant >= 2, -sin, sin)
    return cos, sin


@triton.jit
def partners(DP: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """For each number of a head the index of the one that it is rotated with; PAIRS: its neighbour."""
    d = tl.arange(0, DP)
    partner = tl.where(d < HALF, d + HALF, tl.where(d < 2 * HALF, d - HALF, d))
    if PAIRS:
        partner = tl.where(d < 2 * HALF, d ^ 1, d)
    elif HALF % 8 == 0:
        # Partners of neighbours are neighbours; unless told, the compiler loads them one by one.
        partner = tl.max_contiguous(tl.multiple_of(partner, 8), 8)
    return partner


@triton.jit
def rotation(
    freqs_ptr, position, row,
    DP: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, BY_ROW: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """For each number i of a head: its partner's index, and what to multiply it and its partner by.

    `position`: one, or several as [n,1]; then the factors are [n,DP].
    """
    d = tl.arange(0, DP)
    left = d % 2 == 0 if PAIRS else d < HALF
    turns = d < 2 * HALF
    freqs = freqs_ptr
    if BY_ROW:
        freqs = freqs_ptr + tl.maximum(row, 0).to(tl.int64) * HALF
    freq = tl.load(freqs + (d // 2 if PAIRS else tl.where(left, d, d - HALF)), mask=turns, other=0.0)
    cos, sin = _cos_sin(position.to(tl.float32) * freq)
    own = tl.where(turns, cos * SCALE, 1.0)
    other = tl.where(turns, tl.where(left, -sin, sin) * SCALE, 0.0)
    return partners(DP, HALF, PAIRS), own, other


@triton.jit
def rounded(x, source_ptr, kv_ptr):
    """float32 as the op's parts round it between them, where the cache has fewer bits than they.

    Otherwise it stays: a difference in their last bit would be one in the last of the cache's few.
    """
    if kv_ptr.dtype.element_ty != source_ptr.dtype.element_ty:
        x = x.to(source_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def rope_append(
    qkv_ptr, kv_ptr, positions_ptr, freqs_ptr, rows_ptr, table_ptr, q_norm_ptr, k_norm_ptr, q_out_ptr, M,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, HALF: tl.constexpr,
    PAIRS: tl.constexpr, HB: tl.constexpr, TURNS: tl.constexpr, BY_ROW: tl.constexpr, SCALE: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Heads H of q, K of k and K of v, one after another, HB at a time. Grid: (T, any number).

    Before the wait only what `prepare` wrote is read: see `Draft` for why that is there by then.
    """
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    row = tl.load(rows_ptr + token, cache_modifier=".cg")
    position = tl.load(positions_ptr + token, cache_modifier=".cg")
    partner = partners(DP, HALF, PAIRS)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for turn in tl.static_range(TURNS):
        head = (tl.program_id(1) * TURNS + turn) * HB + tl.arange(0, HB)
        keep = (head < H + 2 * K)[:, None] & (d < D)[None, :]
        source = qkv_ptr + (token * (H + 2 * K) + head)[:, None] * D
        x = tl.load(source + d[None, :], mask=keep, other=0.0)
        y = tl.load(source + partner[None, :], mask=keep, other=0.0)
        if turn == 0:
            # Behind the first heads' loads, which need none of it and are under way meanwhile.
            block = tl.load(table_ptr + row.to(tl.int64) * M + position // B, mask=row >= 0, other=0).to(tl.int64)
        x, y = x.to(tl.float32), y.to(tl.float32)
        rotates = (head < H + K)[:, None]
        if NORM:
            inverse = tl.where(rotates, tl.rsqrt(tl.sum(x * x, 1) / D + EPS)[:, None], 1.0)
            of_q = (head < H)[:, None]
            w = tl.where(of_q, _norm(q_norm_ptr, d, D)[None, :], _norm(k_norm_ptr, d, D)[None, :]) + OFFSET
            u = tl.where(of_q, _norm(q_norm_ptr, partner, D)[None, :], _norm(k_norm_ptr, partner, D)[None, :]) + OFFSET
            x = rounded(tl.where(rotates, x * inverse * w, x), qkv_ptr, kv_ptr)
            y = rounded(y * inverse * u, qkv_ptr, kv_ptr)
        if turn == 0:
            _, own, other = rotation(freqs_ptr, position, row, DP, HALF, PAIRS, BY_ROW, SCALE)
        x = tl.where(rotates, x * own[None, :] + y * other[None, :], x)
        place = (token * H + head)[:, None] * D + d[None, :]
        tl.store(q_out_ptr + place, x.to(q_out_ptr.dtype.element_ty), mask=keep & (head < H)[:, None])
        # A block is [2,K,B,D]: k heads, then v heads, as they stand in a row of qkv.
        place = ((block * (2 * K) + (head - H)) * B + position % B)[:, None] * D + d[None, :]
        x = rounded(x, qkv_ptr, kv_ptr)
        tl.store(kv_ptr + place, x.to(kv_ptr.dtype.element_ty), mask=keep & ((head >= H) & (row >= 0))[:, None])


@triton.jit
def _norm(w_ptr, index, D: tl.constexpr):
    return tl.load(w_ptr + index, mask=index < D, other=0.0).to(tl.float32)


@triton.jit
def rope(
    x_ptr, positions_ptr, freqs_ptr, rows_ptr, out_ptr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, HB: tl.constexpr,
    BY_ROW: tl.constexpr, SCALE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (T, ceil(H / HB))."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HB + tl.arange(0, HB)
    d = tl.arange(0, DP)
    partner, own, other = rotation(
        freqs_ptr, tl.load(positions_ptr + token), tl.load(rows_ptr + token), DP, HALF, PAIRS, BY_ROW, SCALE
    )
    keep = (head < H)[:, None] & (d < D)[None, :]
    start = (token * H + head)[:, None] * D
    x = tl.load(x_ptr + start + d[None, :], mask=keep, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + start + partner[None, :], mask=keep, other=0.0).to(tl.float32)
    x = x * own[None, :] + y * other[None, :]
    tl.store(out_ptr + start + d[None, :], x.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def kv_append(
    kv_ptr, k_ptr, v_ptr, positions_ptr, rows_ptr, table_ptr, M,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, HB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (T, ceil(K / HB))."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token)
    if row < 0:
        return
    position = tl.load(positions_ptr + token)
    block = tl.load(table_ptr + row.to(tl.int64) * M + position // B).to(tl.int64)
    head = tl.program_id(1) * HB + tl.arange(0, HB)
    d = tl.arange(0, DP)
    keep = (head < K)[:, None] & (d < D)[None, :]
    source = (token * K + head)[:, None] * D + d[None, :]
    place = ((block * (2 * K) + head) * B + position % B)[:, None] * D + d[None, :]
    k = tl.load(k_ptr + source, mask=keep)
    v = tl.load(v_ptr + source, mask=keep)
    tl.store(kv_ptr + place, k.to(kv_ptr.dtype.element_ty), mask=keep)
    tl.store(kv_ptr + K * B * D + place, v.to(kv_ptr.dtype.element_ty), mask=keep)
