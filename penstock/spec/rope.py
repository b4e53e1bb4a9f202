"""Rotary frequencies in plain Python: radians a position, for every scaling that a spec can state.

The formulas are those of the papers that each record of `penstock.spec.position` names, in the reading of Hugging Face
transformers 5.17 (`modeling_rope_utils.py`), which is what published checkpoints were checked against.
"""

from __future__ import annotations

import math

from penstock.spec.position import DynamicNtk, Linear, Llama3, LongRope, Rope, Yarn


def inverse_frequencies(rope: Rope, length: int | None = None) -> tuple[float, ...]:
    """d/2 angles, in radians a position.

    `length`, in tokens, is what the request may reach; only a rope that is `by_request` depends on it, and without it
    gives the frequencies of lengths up to the original one.
    """
    match rope.scaling:
        case None:
            return _plain(rope.theta, rope.dim)
        case Linear(factor):
            return tuple(f / factor for f in _plain(rope.theta, rope.dim))
        case DynamicNtk() as scaling:
            return _plain(_ntk_base(rope, scaling, length or scaling.original), rope.dim)
        case Llama3() as scaling:
            return tuple(_llama3(f, scaling) for f in _plain(rope.theta, rope.dim))
        case Yarn() as scaling:
            return _yarn(rope, scaling)
        case LongRope() as scaling:
            divisors = scaling.long if (length or 0) > scaling.original else scaling.short
            return tuple(f / d for f, d in zip(_plain(rope.theta, rope.dim), divisors, strict=True))


def attention_factor(rope: Rope) -> float:
    """What multiplies cosine and sine, and so by its square the scores; 1 but for YaRN and LongRoPE."""
    match rope.scaling:
        case Yarn(attention=None) as scaling:
            return _yarn_attention(scaling)
        case LongRope(attention=None) as scaling:
            if scaling.factor <= 1:
                return 1.0
            return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original))
        case Yarn(attention=float(stated)) | LongRope(attention=float(stated)):
            return stated
    return 1.0


def _plain(theta: float, dim: int) -> tuple[float, ...]:
    return tuple(theta ** -(i / dim) for i in range(0, dim, 2))


def _ntk_base(rope: Rope, scaling: DynamicNtk, length: int) -> float:
    stretch = scaling.factor * max(length, scaling.original) / scaling.original - (scaling.factor - 1)
    return float(rope.theta * stretch ** (rope.dim / (rope.dim - 2)))


def _llama3(frequency: float, scaling: Llama3) -> float:
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original / scaling.low_freq_factor:
        return frequency / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _yarn(rope: Rope, scaling: Yarn) -> tuple[float, ...]:
    """Section 3.2 of the paper: below `low` frequencies are kept, above `high` interpolated, between them blended."""
    low, high = _correction(rope, scaling, scaling.beta_fast), _correction(rope, scaling, scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = (high - low) or 0.001  # the reference implementation's guard against an empty ramp
    ramp = (min(max((i - low) / width, 0.0), 1.0) for i in range(rope.dim // 2))
    return tuple(f / scaling.factor * r + f * (1 - r) for f, r in zip(_plain(rope.theta, rope.dim), ramp, strict=True))


def _correction(rope: Rope, scaling: Yarn, rotations: float) -> float:
    """The index whose frequency makes `rotations` turns within the original length."""
    return rope.dim * math.log(scaling.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_attention(scaling: Yarn) -> float:
    """Equation 22 of the paper; DeepSeek's two mscale fields divide one such factor by another."""

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)
