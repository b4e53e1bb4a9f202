"""What a token costs, from a graph alone."""

from __future__ import annotations

import pytest

from penstock.compiler.work import work_of
from penstock.engine.manifest import Engine
from penstock.engine.profile import Profile
from penstock.ir import Graph, emit
from penstock.ir.cost import cost
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
    assert work["weight_bytes"] == 2 * 8 * 64
    assert (work["expert_bytes"], work["expert_share"]) == (2 * 8 * 3 * 32 * 64, 2 / 8)


def test_a_step_reads_the_experts_that_its_tokens_meet() -> None:
    """As the cost of the op itself has it, whatever the batch."""
    engine = object.__new__(Engine)
    object.__setattr__(engine, "work", {"weight_bytes": 1000.0, "expert_bytes": 4096.0, "expert_share": 2 / 8})
    types = [tensor("bf16", *s) for s in (("T", 16), ("T", 2), ("T", 2), (8, 2 * 8, 16), (8, 16, 8))]
    for tokens in (1, 2, 64):
        experts, dense = cost("moe", types, types[:1], (), {"T": tokens}).bytes, 1000.0
        around = 2 * 16 * 2 * tokens + 2 * 2 * 2 * tokens  # the op's other operands and its result
        size = sum(t.nbytes() for t in types[3:])
        object.__setattr__(engine, "work", {**engine.work, "expert_bytes": float(size)})
        assert engine.step_bytes(tokens) == pytest.approx(dense + experts - around)


def test_a_head_is_multiplied_with_its_own_matrix_alone() -> None:
    x = leaf("input", "x", tensor("bf16", "T", 4 * (8 + 16)))
    w = leaf("weight", "w", tensor("bf16", 4, 32, 16))
    work = work_of(Graph((emit("head_linear", x, w, keep=8)[0],), ("y",)), Profile(8, 64, 128))
    assert work["flops_per_token"] == 2 * 4 * 32 * 16 and work["weight_bytes"] == 2 * 4 * 32 * 16
