"""Each row times the sigmoid of its gate."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_rows(  # type: ignore[no-untyped-def]
    x, gate, y, tokens, E: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr
):
    """y [tokens,E] = x * sigmoid(gate), gate: [tokens,G], each for E // G numbers."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (t < tokens)[:, None] & (e < E)[None, :]
    numbers = tl.load(x + t[:, None] * E + e[None, :], mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(tl.load(gate + t[:, None] * G + (e // (E // G))[None, :], mask=inside, other=0.0).to(tl.float32))
    tl.store(y + t[:, None] * E + e[None, :], numbers * share, mask=inside)
