"""What a token costs, from a graph alone."""

from __future__ import annotations

from penstock.compiler.work import work_of
from penstock.engine.profile import Profile
from penstock.ir import Graph, emit
from penstock.ir.graph import leaf, tensor


def test_a_mixture_multiplies_by_the_experts_of_a_token_alone() -> None:
    x = leaf("input", "x", tensor("bf16", "T", 64))
    router, w_in, w_out = (
        leaf("weight", name, tensor("bf16", *shape))
        for name, shape in (("router", (8, 64)), ("in", (8, 2 * 32, 64)), ("out", (8, 64, 32)))
    )
    scores = emit("linear", x, router, out="f32")[0]
    y = emit("moe", x, *emit("route", scores, chosen=2).outputs, w_in, w_out, act="silu")[0]
    work = work_of(Graph((y,), ("y",)), Profile(8, 64, 128))
    assert work["flops_per_token"] == 2 * (8 * 64 + 2 * 3 * 32 * 64)
    assert work["weight_bytes"] == 2 * (8 * 64 + 8 * 3 * 32 * 64)


def test_a_head_is_multiplied_with_its_own_matrix_alone() -> None:
    x = leaf("input", "x", tensor("bf16", "T", 4 * (8 + 16)))
    w = leaf("weight", "w", tensor("bf16", 4, 32, 16))
    work = work_of(Graph((emit("head_linear", x, w, keep=8)[0],), ("y",)), Profile(8, 64, 128))
    assert work["flops_per_token"] == 2 * 4 * 32 * 16 and work["weight_bytes"] == 2 * 4 * 32 * 16
