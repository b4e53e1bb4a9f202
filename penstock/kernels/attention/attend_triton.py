"""The arithmetic of attention over pages: one tile of keys and values folded into a running softmax.

Rows of a tile are (query, head of the KV head's group) pairs, so that a group's heads share what is loaded of the
cache. Scores live in base 2: exp(x) = exp2(x log2 e).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.attention.narrow_triton import even_and_odd, load_pairs, widened


@triton.jit
def at_index(vector, index, SP: tl.constexpr):
    """vector[index], of non-negative numbers."""
    return tl.sum(tl.where(tl.arange(0, SP) == index, vector, 0))


@triton.jit
def blocks_of(table, tile, low, context, B: tl.constexpr, BN: tl.constexpr):
    """The block of tile `tile`, or that of each of its keys; 0 for what is not read.

    Loaded one turn of the loop before it is used: a load whose address is itself loaded in the same turn would cost
    the pipeline of keys and values a stage.
    """
    if BN <= B:
        blocks = tl.load(table + tile * BN // B, mask=tile * BN < context, other=0)
    else:
        n = tile * BN + tl.arange(0, BN)
        blocks = tl.load(table + n // B, mask=(n >= low) & (n < context), other=0)
    return blocks


@triton.jit
def biased(score, slopes, distances, apart, R: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores with what slopes and distances add: scaled first, unless a cap has done so. `apart`: query less key."""
    if (slopes is not None or distances is not None) and SOFTCAP == 0:
        score *= SCALE
    if slopes is not None:
        score -= slopes * apart.to(tl.float32)
    if distances is not None:
        score += tl.load(distances + tl.minimum(tl.maximum(apart, 0), R - 1))
    return score


@triton.jit
def begun(sinks, of, first, m, total):
    """The running softmax of rows of heads `of` before any key: a sink is a key without a value, seen where `first`."""
    if sinks is not None:
        m = tl.where(first, tl.load(sinks + of) * 1.4426950408889634, m)
        total = tl.where(first, 1.0, total)
    return m, total


@triton.jit
def attend(
    q, gain, m, total, acc, kv, blocks, tile, low, context, at, head, slopes, distances, R: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, BN: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold tile `tile` of keys and values into the running softmax (m, total, acc) of the rows of q.

    `blocks` is what `blocks_of` gave for the tile; `at` is each row's position; keys before `low` or from `context` on
    are not read. MASKED is False only where every row sees every key of the tile. SCALE is positive. q and `gain` are
    what `widened` gave. `slopes`: [rows,1]; `distances`: where each row's begin, likewise.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    n = tile * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    alive = (n >= low) & (n < context)
    if BN <= B:
        start = kv + blocks.to(tl.int64) * (2 * K * B * D) + (head * B + tile * BN % B) * D
        offset = tl.arange(0, BN)[:, None] * D + d[None, :]
    else:
        start = kv + head * (B * D)
        offset = (blocks.to(tl.int64) * (2 * K * B * D) + n % B * D)[:, None] + d[None, :]
    if MASKED or BN > B:
        # What lies outside may be anything, and 0 * NaN is NaN.
        keep = alive[:, None] & (d < D)[None, :]
        k = tl.load(start + offset, mask=keep, other=0.0)
        v = tl.load(start + K * B * D + offset, mask=keep, other=0.0)
    elif DP != D:
        keep = tl.broadcast_to((d < D)[None, :], (BN, DP))
        k = tl.load(start + offset, mask=keep, other=0.0)
        v = tl.load(start + K * B * D + offset, mask=keep, other=0.0)
    else:
        k = tl.load(start + offset)
        v = tl.load(start + K * B * D + offset)
    k, v = k.to(q.dtype), v.to(q.dtype)
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if kv.dtype.element_ty == tl.float8e4nv:
        score *= gain[:, None]
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        score = SOFTCAP - 2 * SOFTCAP / (tl.exp2(score * (2 * LOG2E * SCALE / SOFTCAP)) + 1)
    score = biased(score, slopes, distances, at[:, None] - n[None, :], R, SCALE, SOFTCAP)
    # Scaled only where it is a multiply-add: behind the maximum, in the exponent.
    SCALED: tl.constexpr = SOFTCAP > 0 or slopes is not None or distances is not None
    UNIT: tl.constexpr = LOG2E if SCALED else LOG2E * SCALE
    if MASKED:
        visible = alive[None, :] & (n[None, :] <= at[:, None])
        if WINDOW > 0:
            visible = visible & (n[None, :] > at[:, None] - WINDOW)
        score = tl.where(visible, score, float("-inf"))
    highest = tl.maximum(m, tl.max(score, 1) * UNIT)
    base = highest
    if MASKED:
        # A row that has seen no key yet has no maximum; -inf - -inf is NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
    fade = tl.exp2(m - base)
    p = tl.exp2(score * UNIT - base[:, None])
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return highest, total, acc


@triton.jit
def blocks_apart(table, tile, low, context, B: tl.constexpr, W: tl.constexpr, BW: tl.constexpr):
    """The blocks of the W shares of a tile, BW keys each; 0 for what is not read."""
    n = tile * (W * BW) + tl.arange(0, W) * BW
    return tl.load(table + n // B, mask=(n + BW > low) & (n < context), other=0)


@triton.jit
def attend_apart(
    q, gain, m, total, acc, kv, blocks, tile, low, context, at, head, slopes, distances, R: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`attend` for few rows: W warps, each with a running softmax of its own over its BW keys of the tile.

    So no warp waits for another's scores. q: [W,BM,DP]; m, total: [W,BM]; acc: [W,BM,DP], or where the
    cache is in fp8 its even columns and its odd ones. `slopes`, `distances`: [1,BM,1].
    """
    NARROW: tl.constexpr = kv.dtype.element_ty == tl.float8e4nv
    LOG2E: tl.constexpr = 1.4426950408889634
    SCALED: tl.constexpr = SOFTCAP > 0 or slopes is not None or distances is not None
    UNIT: tl.constexpr = LOG2E if SCALED else LOG2E * SCALE
    first = tile * (W * BW) + tl.arange(0, W) * BW
    n = first[:, None] + tl.arange(0, BW)[None, :]
    d = tl.arange(0, DP)
    alive = (n >= low) & (n < context)
    start = kv + (blocks.to(tl.int64) * (2 * K * B * D) + (head * B + first % B) * D)[:, None, None]
    place = start + tl.arange(0, BW)[None, :, None] * D + d[None, None, :]
    keep = alive[:, :, None] & (d < D)[None, None, :]
    k = tl.load(place, mask=keep, other=0.0)
    if NARROW:
        pairs = blocks.to(tl.int64) * (K * B * D) + ((K + head) * B + first % B) * (D // 2)
        v = load_pairs(kv, pairs, alive, D, DP, BW)
    else:
        v = tl.load(place + K * B * D, mask=keep, other=0.0)
    score = tl.dot(q, tl.trans(k.to(q.dtype), (0, 2, 1)))
    if NARROW:
        score *= gain[None, :, None]
    if SOFTCAP > 0:
        score = SOFTCAP - 2 * SOFTCAP / (tl.exp2(score * (2 * LOG2E * SCALE / SOFTCAP)) + 1)
    score = biased(score, slopes, distances, at[None, :, None] - n[:, None, :], R, SCALE, SOFTCAP)
    visible = alive[:, None, :]
    if WINDOW > 0:
        visible = visible & (n[:, None, :] > at[None, :, None] - WINDOW)
    score = tl.where(visible & (n[:, None, :] <= at[None, :, None]), score, float("-inf"))
    highest = tl.maximum(m, tl.max(score, 2) * UNIT)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    fade = tl.exp2(m - base)
    p = tl.exp2(score * UNIT - base[:, :, None])
    total = total * fade + tl.sum(p, 2)
    p = p.to(q.dtype)
    if NARROW:
        left, right = even_and_odd(v, q.dtype, NATIVE)
        even, odd = acc
        acc = tl.dot(p, left, even * fade[:, :, None]), tl.dot(p, right, odd * fade[:, :, None])
    else:
        acc = tl.dot(p, v, acc * fade[:, :, None])
    return highest, total, acc


@triton.jit
def together(m, total, acc, W: tl.constexpr, BM: tl.constexpr, DP: tl.constexpr, NARROW: tl.constexpr):
    """The running softmax over all that W warps have seen: [W,BM], [W,BM], [W,BM,DP] to [BM], [BM], [BM,DP].

    NARROW: acc comes as its even columns and its odd ones.
    """
    highest = tl.max(m, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(m - base[None, :])
    if NARROW:
        even, odd = _added(acc[0], weight, W, BM, DP // 2), _added(acc[1], weight, W, BM, DP // 2)
        y = tl.reshape(tl.join(even, odd), (BM, DP))
    else:
        y = _added(acc, weight, W, BM, DP)
    return highest, tl.sum(total * weight, 0), y


@triton.jit
def _added(acc, weight, W: tl.constexpr, BM: tl.constexpr, DP: tl.constexpr):
    """The weighted sum over warps: in halves, which moves numbers between warps at once; a reduction would move one
    after another."""
    x = tl.permute(acc * weight[:, :, None], (1, 2, 0))
    if W >= 8:
        left, right = tl.split(tl.reshape(x, (BM, DP, W // 2, 2)))
        x = left + right
    if W >= 4:
        left, right = tl.split(tl.reshape(x, (BM, DP, 2, 2)))
        x = left + right
    left, right = tl.split(x)
    return left + right


@triton.jit
def over_pages(
    q, kv, table, begin, end, low, context, at, head, part, of, slopes, distances, sinks, R: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, W: tl.constexpr,
    BN: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The running softmax of a few rows q [BM,DP] over tiles `begin` to `end` of a sequence's pages, its part `part`.

    `of`: each row's head, [BM], to which `slopes`, R `distances` and `sinks` belong, or None.
    W > 1: as many warps, each with its own share of a tile. W = 1: all warps together.
    """
    q, gain = widened(q, kv)
    if W == 1:
        m, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
        m, total = begun(sinks, of, part == 0, m, total)
        if slopes is not None:
            slopes = tl.load(slopes + of)[:, None]
        if distances is not None:
            distances += (of * R)[:, None]
        acc = tl.zeros((BM, DP), tl.float32)
        blocks = blocks_of(table, begin, low, context, B, BN)
        for tile in range(begin, end):
            m, total, acc = attend(
                q, gain, m, total, acc, kv, blocks, tile, low, context, at, head, slopes, distances, R,
                K, D, DP, B, BN, SCALE, SOFTCAP, WINDOW, True,
            )  # fmt: skip
            blocks = blocks_of(table, tile + 1, low, context, B, BN)
    else:
        q = tl.broadcast_to(q[None, :, :], (W, BM, DP))
        m, total = tl.full((W, BM), float("-inf"), tl.float32), tl.zeros((W, BM), tl.float32)
        m, total = begun(sinks, of[None, :], (part == 0) & (tl.arange(0, W) == 0)[:, None], m, total)
        if slopes is not None:
            slopes = tl.load(slopes + of)[None, :, None]
        if distances is not None:
            distances += (of * R)[None, :, None]
        NARROW: tl.constexpr = kv.dtype.element_ty == tl.float8e4nv
        if NARROW:
            acc = tl.zeros((W, BM, DP // 2), tl.float32), tl.zeros((W, BM, DP // 2), tl.float32)
        else:
            acc = tl.zeros((W, BM, DP), tl.float32)
        blocks = blocks_apart(table, begin, low, context, B, W, BN // W)
        for tile in range(begin, end):
            m, total, acc = attend_apart(
                q, gain, m, total, acc, kv, blocks, tile, low, context, at, head, slopes, distances, R,
                K, D, DP, B, W, BN // W, SCALE, SOFTCAP, WINDOW, NATIVE,
            )  # fmt: skip
            blocks = blocks_apart(table, tile + 1, low, context, B, W, BN // W)
        m, total, acc = together(m, total, acc, W, BM, DP, NARROW)
    return m, total, acc
