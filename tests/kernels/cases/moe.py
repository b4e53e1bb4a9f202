"""Mixtures of experts: small ones, of every way of routing, format, bias and activation, odd sizes among them."""

from __future__ import annotations

from typing import Any

from penstock.engine.program import Site, Sizes
from penstock.ir.graph import tensor
from penstock.ir.op import get


def route(experts: int, chosen: int, *, bias: bool = False, **attrs: Any) -> Site:
    types = (tensor("f32", "T", experts), *((tensor("f32", experts),) if bias else ()))
    attrs = {"chosen": chosen, **attrs}
    return Site("route", types, get("route").types(types, attrs), tuple(sorted(attrs.items())), (1,) if bias else ())


def moe(
    format: str, experts: int, chosen: int, e: int, f: int, act: str = "silu", *, bias: bool = False, w: str = "",
    **attrs: Any,
) -> Site:  # fmt: skip
    w = w or format
    types = (
        tensor(format, "T", e), tensor("i32", "T", chosen), tensor("f32", "T", chosen), tensor(w, experts, 2 * f, e),
        tensor(w, experts, e, f), *((tensor(w, experts, 2 * f), tensor(w, experts, e)) if bias else ()),
    )  # fmt: skip
    attrs = {"act": act, **attrs}
    weights = tuple(range(3, len(types)))
    return Site("moe", types, get("moe").types(types, attrs), tuple(sorted(attrs.items())), weights)


GROUPED: dict[str, Any] = {"groups": 4, "kept_groups": 2}
ROUTES: list[tuple[Site, Sizes]] = [
    (route(8, 2, renormalize=1.0), {"T": 70}),
    (route(8, 2, renormalize=1.0), {"T": 1}),
    (route(60, 4), {"T": 5}),
    (route(128, 8, renormalize=1.0), {"T": 3}),
    (route(16, 4, renormalize=2.0, factor=0.5), {"T": 9}),
    (route(32, 4, score="top_softmax"), {"T": 65}),
    (route(24, 6, factor=16.0, **GROUPED), {"T": 7}),
    (route(256, 8, bias=True, score="sigmoid", renormalize=1.0, groups=8, kept_groups=4, group_top=2), {"T": 6}),
    (route(20, 3, score="sigmoid", renormalize=1.0, group_top=2, **GROUPED), {"T": 64}),
    (route(12, 3, bias=True), {"T": 2}),
    (route(5, 5, score="sigmoid"), {"T": 4}),
    (route(3, 1), {"T": 4}),
    (route(1, 1, renormalize=1.0), {"T": 3}),
]
CLAMPED: dict[str, Any] = {"act": "swiglu_clamped", "limit": 0.5, "bias": True}
MIXTURES: list[tuple[Site, Sizes]] = [
    # The first case of each tactic is interpreted in all its configurations.
    (moe("bf16", 5, 2, 40, 20), {"T": 2}),
    (moe("bf16", 3, 2, 72, 40), {"T": 70}),
    (moe("bf16", 4, 2, 72, 12), {"T": 1}),
    (moe("f16", 6, 1, 16, 40, "gelu"), {"T": 3}),
    (moe("f32", 3, 3, 18, 12, "gelu_tanh"), {"T": 3}),
    (moe("bf16", 12, 4, 16, 8, **CLAMPED), {"T": 2}),
    (moe("f32", 7, 2, 40, 24, **CLAMPED), {"T": 40}),
    (moe("bf16", 33, 8, 16, 4, "relu"), {"T": 3}),
    (moe("bf16", 4, 2, 32, 12, w="f32"), {"T": 2}),
    (moe("f16", 2, 1, 33, 17, bias=True), {"T": 17}),
    (moe("bf16", 1, 1, 24, 16), {"T": 5}),
]
CASES = [*ROUTES, *MIXTURES]


def examples(site: Site, sizes: Sizes, generator: Any) -> list[list[Any]]:
    """Of a mixture: experts at random; all tokens at the same ones, so that some have none."""
    import torch

    example = get(site.op).example
    assert example is not None
    inputs = list(example(site.inputs, dict(site.attrs), sizes, generator, str(generator.device)))
    if site.op == "route":
        ties = inputs[0].clone().round()
        ties[:, 0] = torch.nan
        return [inputs, [ties, *inputs[1:]]]
    same = inputs[1][:1].expand_as(inputs[1]).contiguous()
    return [inputs, [inputs[0], same, *inputs[2:]]]


def agree(site: Site, inputs: Any, want: Any, got: Any) -> str:
    """As everywhere, but that weights which are no numbers are to be none on both sides."""
    from tests.kernels.subprocess_cases import differences

    both = [w.isnan() & g.isnan() if site.op == "route" else None for w, g in zip(want, got, strict=True)]
    want, got = ([_without(x, at) for x, at in zip(xs, both, strict=True)] for xs in (want, got))
    return differences(site, inputs, want, got)


def _without(x: Any, at: Any) -> Any:
    return x if at is None else x.masked_fill(at, 0)
