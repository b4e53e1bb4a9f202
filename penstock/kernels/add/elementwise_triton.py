"""Element by element over flat tensors."""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.activation_triton import activate


@triton.jit
def add(x, y, z, count, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """z = x + y, `count` numbers each."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    left = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(z + at, left + right, mask=inside)


@triton.jit
def _softcap(x, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """CAP * tanh(x / CAP), by exp, and near zero, where that would cancel, by Taylor's series."""
    u = x / CAP
    z = u * u
    near = u * (1 + z * (-1 / 3 + z * (2 / 15 + z * (-17 / 315))))
    far = 1 - 2 / (tl.exp(2 * u) + 1)
    return CAP * tl.where(tl.abs(u) < 0.1, near, far)


@triton.jit
def pointwise(x, z, count, OP: tl.constexpr, BY: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """z = x, x * BY, x clipped or capped at BY, or the activation BY of x; `count` numbers."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if OP == "scale":
        y = y * BY
    elif OP == "clip":  # comparisons keep what is not a number
        y = tl.where(y > BY, BY, tl.where(y < -BY, -BY, y))
    elif OP == "softcap":
        y = _softcap(y, BY)
    elif OP != "widen":
        tl.static_assert(OP == "activate")
        y = activate(y, BY)
    tl.store(z + at, y, mask=inside)
