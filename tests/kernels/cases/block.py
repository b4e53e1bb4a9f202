"""From one attention to the next: tiles that end within the matrices, one round of gated tiles and several."""

from __future__ import annotations

from penstock.engine.program import Site, Sizes
from penstock.ir.graph import tensor
from penstock.ir.op import get


def dense_block(
    q: int, e: int, f: int, n: int, *, bias: bool = False, act: str = "silu", offset: float = 0.0, format: str = "bf16"
) -> Site:
    """x [T,q] through [e,q], gated [2f,e], [e,f] and [n,e]."""
    shapes = [("T", q), (e, q), ("T", e), (e,), (2 * f, e), (e, f), (e,), (n, e), *([(n,)] if bias else [])]
    types = tuple(tensor(format, *shape) for shape in shapes)
    attrs = {"eps": 1e-5, "act": act} | ({"offset": offset} if offset else {})
    weights = tuple(range(3, len(types)))
    return Site(
        "dense_block", types, get("dense_block").types(types, attrs), tuple(sorted(attrs.items())), (1, *weights)
    )


CASES: list[tuple[Site, Sizes]] = [
    (dense_block(256, 192, 344, 328, bias=True), {"T": 3}),
    (dense_block(384, 520, 4224, 640, act="gelu_tanh", offset=1.0), {"T": 20}),
    (dense_block(1024, 1032, 5280, 1544, bias=True), {"T": 64}),
    (dense_block(512, 1320, 712, 264), {"T": 100}),
]
