"""Launches that a step of single tokens does without."""

from __future__ import annotations

from dataclasses import replace

from penstock.engine.device import H200
from penstock.engine.program import Arg, KernelLaunch, Plan, plan_from_json, plan_to_json
from penstock.ir.cost import cost
from penstock.ir.ops.examples import FEW, most_queries, singles_beside
from penstock.kernels.rope_attention.step import Step
from penstock.kernels.tactic import frozen_plan
from tests.kernels.cases.attention import attention, rope_attention, sizes

FIRST = KernelLaunch("a", (1, 1, 1), (Arg("in", 0),))
SECOND = replace(FIRST, kernel="b", singles=False)


def test_a_plan_for_single_tokens_keeps_all_else() -> None:
    plan = Plan("t", (FIRST, SECOND), 512, 16)
    assert plan.for_singles == Plan("t", (FIRST,), 512, 16)
    assert (single := plan.for_singles).for_singles is single
    assert plan_from_json(plan_to_json(plan)) == plan


def test_long_rows_alone_need_the_second_launch_of_a_step() -> None:
    site = rope_attention("bf16", 32, 8, 128)
    for tokens, launches in ((4, 1), (5, 2), (64, 2), (512, 2)):
        at = sizes(tokens, tokens, 4)
        plan = frozen_plan("step", Step().plan(site, at, H200, Step().tunables(site, at, H200)[0]), 90)
        assert len(plan.launches) == launches and plan.for_singles.launches == plan.launches[:1]


def test_examples_of_few_tokens_are_a_prompt_beside_single_tokens() -> None:
    assert [singles_beside(sizes(t, 64, 64)) for t in (64, 65, FEW, FEW + 1)] == [0, 16, 16, 0]
    assert singles_beside(sizes(100, 1, 64)) == 0
    assert [most_queries(sizes(t, 64, 64)) for t in (64, 448, 8192)] == [1, 432, 128]
    # 16 rows read 1024 keys and their own, the prompt its own 432.
    site = attention("bf16", 32, 8, 128)
    found = cost(site.op, site.inputs, site.outputs, dict(site.attrs), {**sizes(448, 64, 64), "L": 1})
    assert found.bytes >= 2 * 8 * 128 * 2 * (16 * 1025 + 432)
    assert found.bytes < 2 * 8 * 128 * 2 * (16 * 1025 + 432) + 448 * 4096 * 2 * 3
