"""act(gate) * up, element by element."""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.activation_triton import activate


@triton.jit
def glu(  # type: ignore[no-untyped-def]
    gate,
    up,
    y,
    tokens,
    F: tl.constexpr,
    STRIDE: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACT: tl.constexpr,
    PDL: tl.constexpr,
):
    """y [tokens,F] = act(gate) * up; rows of gate and up are STRIDE apart, and up starts OFFSET elements on."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (t < tokens) & (f < F)
    left = tl.load(gate + t * STRIDE + f, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(up + OFFSET + t * STRIDE + f, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t * F + f, activate(left, ACT) * right, mask=inside)
