"""Activations inside kernels, in float32. Only exp is used, which Triton's interpreter also knows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gelu(x):  # type: ignore[no-untyped-def]
    """x times the normal distribution's share below it, to 1.5e-7 (Abramowitz and Stegun 7.1.26): erf by itself takes
    registers that a product's epilogue does not have."""
    u = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * u)
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    above = 0.5 * p * tl.exp(-u * u)
    return x * tl.where(x > 0, 1.0 - above, above)


@triton.jit
def activate(x, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """An activation of float32 `x`, see `ir.ops.pointwise`; (1 + tanh(u)) / 2 is written sigmoid(2u)."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = _gelu(x)
    elif ACT == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "gelu_quick":
        y = x * tl.sigmoid(1.702 * x)
    else:
        tl.static_assert(ACT == "relu" or ACT == "relu2")
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # what is not a number must not become zero
        if ACT == "relu2":
            y = y * y
    return y
