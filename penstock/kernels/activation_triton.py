"""Activations inside kernels, in float32. Only exp and erf are used, which Triton's interpreter also knows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """An activation of float32 `x`, see `ir.ops.pointwise`; (1 + tanh(u)) / 2 is written sigmoid(2u)."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "gelu_quick":
        y = x * tl.sigmoid(1.702 * x)
    else:
        tl.static_assert(ACT == "relu" or ACT == "relu2")
        y = tl.maximum(x, 0.0)
        if ACT == "relu2":
            y = y * y
    return y
