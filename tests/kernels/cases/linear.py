"""Products and gates: small shapes, odd ones among them, for every format, bias and result format."""

from __future__ import annotations

from penstock.engine.program import Site, Sizes
from penstock.ir.graph import Type, tensor
from penstock.ir.op import get


def _site(op: str, inputs: tuple[Type, ...], weights: tuple[int, ...] = (), **attrs: str | float) -> Site:
    return Site(op, inputs, get(op).types(inputs, attrs), tuple(sorted(attrs.items())), weights)


def linear(format: str, n: int, k: int, *, bias: bool = False, out: str = "", w: str = "", tokens: str = "T") -> Site:
    """x [tokens,k] @ w [n,k].T, w in x's format unless named."""
    types = (tensor(format, tokens, k), tensor(w or format, n, k), *((tensor(format, n),) if bias else ()))
    return _site("linear", types, (1, 2) if bias else (1,), **({"out": out} if out else {}))


def linear_glu(format: str, f: int, e: int, act: str) -> Site:
    return _site("linear_glu", (tensor(format, "T", e), tensor(format, 2 * f, e)), (1,), act=act)


def linear_activate(format: str, n: int, k: int, act: str, *, bias: bool = True) -> Site:
    types = (tensor(format, "T", k), tensor(format, n, k), *((tensor(format, n),) if bias else ()))
    return _site("linear_activate", types, (1, 2) if bias else (1,), act=act)


def linear_norm_linear(
    format: str, e: int, k: int, n: int, *, act: str = "", bias: bool = False, offset: float = 0.0
) -> Site:
    """x [T,k] @ w [e,k].T + residual, its norm, then n columns, or with `act` n gated ones."""
    types = (
        tensor(format, "T", k), tensor(format, e, k), tensor(format, "T", e), tensor(format, e),
        tensor(format, 2 * n if act else n, e), *((tensor(format, n),) if bias else ()),
    )  # fmt: skip
    attrs = {"eps": 1e-5} | ({"act": act} if act else {}) | ({"offset": offset} if offset else {})
    return _site("linear_norm_linear", types, (1, 3, 4, 5) if bias else (1, 3, 4), **attrs)


def glu(format: str, f: int, act: str) -> Site:
    return _site("glu", (tensor(format, "T", f), tensor(format, "T", f)), act=act)


def packed_glu(format: str, f: int, act: str) -> Site:
    return _site("packed_glu", (tensor(format, "T", 2 * f),), act=act)


CASES: list[tuple[Site, Sizes]] = [
    # The first case of each tactic is interpreted in all its configurations: K that several tiles share, N past a tile.
    (linear("bf16", 72, 2560, bias=True), {"T": 3}),
    (linear("f16", 136, 288), {"T": 70}),
    (linear("bf16", 64, 2048), {"T": 1}),
    (linear("bf16", 33, 1001, bias=True), {"T": 1}),
    (linear("f32", 50, 300, out="f32"), {"T": 1}),
    (linear("f16", 96, 8200), {"T": 1}),
    (linear("f16", 17, 24), {"T": 8}),
    (linear("bf16", 48, 512, w="f32"), {"T": 5}),
    (linear("bf16", 257, 256, out="f32", tokens="L"), {"L": 2, "T": 9}),
    (linear("bf16", 200, 520, bias=True, out="f32"), {"T": 17}),
    (linear("f32", 40, 100, bias=True), {"T": 33}),
    (linear("bf16", 70, 4096), {"T": 9}),
    (linear("f16", 65, 2050, bias=True), {"T": 64}),
    (linear("bf16", 100, 77, bias=True, out="f32"), {"T": 65}),
    (linear("bf16", 320, 192), {"T": 300}),
    (linear("f32", 70, 50), {"T": 130}),
    (linear_glu("bf16", 40, 2560, "silu"), {"T": 2}),
    (linear_glu("f16", 136, 96, "gelu_tanh"), {"T": 66}),
    (linear_glu("bf16", 72, 136, "silu"), {"T": 300}),
    (linear_glu("f16", 129, 264, "gelu_tanh"), {"T": 136}),
    (linear_glu("bf16", 1000, 320, "silu"), {"T": 400}),
    (linear("bf16", 200, 1032, bias=True), {"T": 257}),
    (linear("f16", 1000, 2056), {"T": 200}),
    (linear("bf16", 328, 520, out="f32"), {"T": 511}),
    (linear_glu("f32", 33, 300, "gelu"), {"T": 1}),
    (linear_glu("f16", 65, 1032, "relu"), {"T": 16}),
    (linear_glu("f32", 31, 45, "silu"), {"T": 40}),
    (linear_glu("bf16", 129, 264, "gelu"), {"T": 5}),
    (linear_norm_linear("bf16", 264, 1032, 72, bias=True), {"T": 3}),
    (linear_norm_linear("bf16", 100, 300, 70), {"T": 1}),
    (linear_norm_linear("bf16", 72, 520, 33, act="silu", offset=1.0), {"T": 1}),
    (linear_norm_linear("f32", 136, 96, 40, act="gelu_tanh"), {"T": 5}),
    (linear_norm_linear("bf16", 192, 2560, 130, act="silu"), {"T": 40}),
    (linear_norm_linear("bf16", 129, 77, 65), {"T": 7}),
    (linear_norm_linear("bf16", 264, 520, 72, bias=True), {"T": 300}),
    (linear_norm_linear("bf16", 264, 520, 136, act="silu", offset=1.0), {"T": 60}),
    (glu("bf16", 300, "silu"), {"T": 3}),
    (glu("f32", 1025, "gelu"), {"T": 1}),
    (glu("f16", 40, "gelu_tanh"), {"T": 67}),
    (packed_glu("bf16", 516, "gelu_tanh"), {"T": 5}),
    (packed_glu("f32", 77, "relu"), {"T": 70}),
    (packed_glu("f16", 2050, "silu"), {"T": 2}),
    (packed_glu("bf16", 640, "gelu"), {"T": 1}),
    (linear_activate("bf16", 72, 1032, "gelu"), {"T": 3}),
    (linear_activate("f16", 136, 288, "gelu_tanh"), {"T": 70}),
    (linear_activate("f32", 33, 100, "relu", bias=False), {"T": 5}),
    (linear_activate("f32", 40, 100, "relu2"), {"T": 33}),
    (linear_activate("bf16", 200, 520, "gelu_quick", bias=False), {"T": 17}),
    (linear_activate("bf16", 200, 1032, "gelu"), {"T": 257}),
    (linear_activate("f16", 264, 2056, "relu2"), {"T": 200}),
    (linear_activate("bf16", 129, 264, "gelu_tanh"), {"T": 40}),
    (linear_glu("bf16", 264, 520, "relu2"), {"T": 300}),
    (linear_glu("bf16", 72, 136, "gelu_quick"), {"T": 16}),
]
