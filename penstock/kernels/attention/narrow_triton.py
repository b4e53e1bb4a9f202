"""What attention does for a cache in fp8: keys and values are widened in registers, exactly, to f16.

Hopper converts two of them to f16 in one instruction, and to bf16 in three. So queries in bf16 become f16 too, and the
weights of values with them, which f16 holds in three bits more.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(q, kv):
    """Queries [BM,DP] in the format that products are made in, and what each row's scores are to be multiplied by.

    f16 has too little range for bf16: a row is scaled by the power of two that brings its largest number to one. What
    is lost lies 25 bits below that number.
    """
    gain = tl.sum(tl.zeros(q.shape, tl.float32), 1) + 1
    if kv.dtype.element_ty == tl.float8e4nv and q.dtype == tl.bfloat16:
        x = q.to(tl.float32)
        power = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.minimum(tl.maximum(power, 1 << 23), 253 << 23)
        gain = power.to(tl.float32, bitcast=True)
        q = (x * ((254 << 23) - power).to(tl.float32, bitcast=True)[:, None]).to(tl.float16)
    return q, gain


@triton.jit
def load_pairs(kv, start, keep, D: tl.constexpr, DP: tl.constexpr, BW: tl.constexpr):
    """Values [W,BW,DP/2] of the shares of a tile, which begin at pairs `start` [W] of the cache.

    Tensor cores want neighbouring keys of one column side by side. The instruction that turns a tile so takes 16 bits
    at a time; bytes by themselves would be loaded one by one.
    """
    pair = tl.arange(0, DP // 2)
    place = start[:, None, None] + tl.arange(0, BW)[None, :, None] * (D // 2) + pair[None, None, :]
    keep = keep[:, :, None] & (pair < D // 2)[None, None, :]
    return tl.load(kv.to(tl.pointer_type(tl.int16)) + place, mask=keep, other=0)


@triton.jit
def even_and_odd(pairs, TYPE: tl.constexpr, NATIVE: tl.constexpr):
    """The first and the second of each pair, as f16; NATIVE: two at a time are brought together by one instruction."""
    if NATIVE:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 x, y;
            .reg .b16 even, odd, none;
            prmt.b32 x, $2, 0, 0x4420;
            prmt.b32 y, $2, 0, 0x4431;
            mov.b32 {even, none}, x;
            mov.b32 {odd, none}, y;
            cvt.rn.f16x2.e4m3x2 $0, even;
            cvt.rn.f16x2.e4m3x2 $1, odd;
            }""",
            "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        even = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(TYPE)
        odd = ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(TYPE)
    return even, odd
