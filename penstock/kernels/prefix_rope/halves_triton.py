"""Both halves of each head turned, each as a head of its own that has its own place."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.rope_append.position_triton import rotation


@triton.jit
def prefix_rope(
    x_ptr, positions_ptr, freqs_ptr, rows_ptr, prefix_len_ptr, out_ptr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, HB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (T, ceil(H / HB)); H halves of D numbers."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    half = tl.program_id(1) * HB + tl.arange(0, HB)
    d = tl.arange(0, DP)
    position, row = tl.load(positions_ptr + token), tl.load(rows_ptr + token)
    behind = position - tl.load(prefix_len_ptr + tl.maximum(row, 0)) + 1
    place = tl.where(half % 2 == 0, tl.minimum(position, position - behind), tl.maximum(behind, 0))
    partner, own, other = rotation(freqs_ptr, place[:, None], row, DP, HALF, False, False, 1.0)
    keep = (half < H)[:, None] & (d < D)[None, :]
    start = (token * H + half)[:, None] * D
    x = tl.load(x_ptr + start + d[None, :], mask=keep, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + start + partner[None, :], mask=keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + d[None, :], (x * own + y * other).to(out_ptr.dtype.element_ty), mask=keep)
