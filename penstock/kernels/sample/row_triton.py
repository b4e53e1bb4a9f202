"""What both launches of the sampler ask of a row: its logits as they count, their order as integers, its noise."""

from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(2147483647)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of the finite floats
FEW = tl.constexpr(256)  # a top_k up to this is small


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
def log2_of(x, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The hardware's logarithm: only absolutely accurate near 1, and without the branches of the library's."""
    if NATIVE:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def noise_of(key, token, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """-log(-log(u)) of the token's draw u. Near u = 1, where winners lie, -log(u) is the series of w = 1 - u."""
    bits = _mix(key ^ _mix(_spread(token)))
    # A float in [1, 2) has 23 random bits: u is that less 1, and half a bit more, which is exact and never 0 or 1.
    u = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    w = 1.0 - u
    series = w * (1.0 + w * (0.5 + w * (0.33333333 + w * (0.25 + w * (0.2 + w * 0.16666667)))))
    return -0.6931471805599453 * log2_of(tl.where(w < 0.125, series, -0.6931471805599453 * log2_of(u, NATIVE)), NATIVE)


@triton.jit
def noise_key(seed, position, row):  # type: ignore[no-untyped-def]
    return _mix(_mix(tl.load(seed + row).to(tl.uint32, bitcast=True)) ^ _spread(tl.load(position + row)))


@triton.jit
def filters_of(temperature, top_k, top_p, min_p, row, V: tl.constexpr):  # type: ignore[no-untyped-def]
    """(temperature, top_k or 0 where it keeps all, top_p, min_p, whether the row filters, whether by a small top_k)."""
    hot, k, p, least = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    k = tl.where((k < 0) | (k >= V), 0, k)
    filters = (hot > 0) & ((k > 0) | (p < 1) | (least > 0))
    return hot, k, p, least, filters, filters & (k > 0) & (k <= FEW)


@triton.jit
def scaled_by(x, hot):  # type: ignore[no-untyped-def]
    """As the reference scales: rounded as it rounds, zero without a sign so that ties are ties of bits. Monotonic, and
    a number for every number: infinity is divided by nothing infinite."""
    x = tl.div_rn(x, tl.minimum(tl.where(hot > 0, hot, 1.0), LARGEST))
    return tl.where(x == 0, 0.0, x)


@triton.jit
def logits_at(logits, inside):  # type: ignore[no-untyped-def]
    x = tl.load(logits, mask=inside, other=-float("inf")).to(tl.float32)
    return tl.where(x == x, x, -float("inf"))


@triton.jit
def order_of(x):  # type: ignore[no-untyped-def]
    """Integers in the order of the floats. Of numbers, at most that of infinity: there is room above."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def float_of(ordered):  # type: ignore[no-untyped-def]
    """The float of such an integer."""
    return tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)


@triton.jit
def first_best(score, token):  # type: ignore[no-untyped-def]
    """The largest score, and the lowest token that has it."""
    best = tl.max(score)
    return best, tl.min(tl.where(score == best, token, NOWHERE))


@triton.jit
def mass_of(x, top):  # type: ignore[no-untyped-def]
    """exp(x - top), and nothing where x is minus infinity, be it the top itself."""
    return tl.where(x > -float("inf"), tl.exp(x - top), 0.0)


@triton.jit
def quad_of(group, part, LANES: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first of four neighbouring tokens that are part `part` of a group. A chunk is LANES groups of SIZE tokens,
    whose parts lie side by side: what a thread reads is a group."""
    return group // LANES * (LANES * SIZE) + group % LANES * 4 + part * (LANES * 4)
