"""A token's rotated key and its latent, side by side into its place of the cache."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def latent_append(
    kv_ptr, key_ptr, latent_ptr, positions_ptr, rows_ptr, table_ptr, M,
    R: tl.constexpr, C: tl.constexpr, WP: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (T,)."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token, cache_modifier=".cg")
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if row < 0:
        return
    position = tl.load(positions_ptr + token)
    block = tl.load(table_ptr + row.to(tl.int64) * M + position // B).to(tl.int64)
    i = tl.arange(0, WP)
    key = tl.load(key_ptr + token * R + i, mask=i < R, other=0.0)
    latent = tl.load(latent_ptr + token * C + i - R, mask=(i >= R) & (i < R + C), other=0.0)
    place = kv_ptr + (block * B + position % B) * (R + C) + i
    tl.store(place, tl.where(i < R, key, latent).to(kv_ptr.dtype.element_ty), mask=i < R + C)
