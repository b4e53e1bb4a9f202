"""Each head of a tile of tokens times its matrix, on the tensor cores."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_linear(
    x_ptr, w_ptr, y_ptr, tokens,
    H: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, KEEP: tl.constexpr, KP: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x: [tokens,H*(KEEP+IN)], w: [H,OUT,IN] -> y [tokens,H*(KEEP+OUT)]. Grid: (H, tiles of w's rows, of tokens).

    The programs of the first rows also copy what each head keeps.
    """
    head = tl.program_id(0)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    o = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    alive = (t < tokens)[:, None]
    x = x_ptr + (t.to(tl.int64)[:, None] * H + head) * (KEEP + IN)
    y = y_ptr + (t.to(tl.int64)[:, None] * H + head) * (KEEP + OUT)
    w = w_ptr + (head.to(tl.int64) * OUT + o)[:, None] * IN
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    for first in tl.range(0, IN, COLUMNS, num_stages=STAGES):
        i = first + tl.arange(0, COLUMNS)[None, :]
        x_tile = tl.load(x + KEEP + i, mask=alive & (i < IN), other=0.0)
        w_tile = tl.load(w + i, mask=(o < OUT)[:, None] & (i < IN), other=0.0)
        acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")
    tl.store(y + KEEP + o[None, :], acc.to(y_ptr.dtype.element_ty), mask=alive & (o < OUT)[None, :])
    if KEEP > 0:
        k = tl.arange(0, KP)[None, :]
        own = alive & (k < KEEP) & (tl.program_id(1) == 0)
        tl.store(y + k, tl.load(x + k, mask=own), mask=own)
