"""The memory plan of a GPU's engine, made without one: what is planned is what is laid out, and what fails says how."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.engine.memory import (
    PAGE,
    aligned,
    arena_top,
    bucket_keys,
    calls_library,
    least_budget,
    plan_run,
    weight_offsets,
)
from penstock.errors import ResourceError
from tests.cpu.cli.test_inspect_gpu import engine as engine_dir

__all__ = ["engine_dir"]  # a fixture: an engine of the tiny model for an H200
PLENTY = 1 << 40


@pytest.fixture
def engine(engine_dir: Path) -> Engine:
    return store.load(engine_dir)


def test_the_whole_is_the_sum_of_what_is_laid_out(engine: Engine) -> None:
    plan, profile = plan_run(engine, PLENTY), engine.profile
    (blocks,) = plan.blocks
    assert blocks == 1 + profile.max_batch_size * profile.table_width  # more could never be used
    assert plan.kv == blocks * engine.block_bytes and plan.tokens == (blocks - 1) * profile.block_size
    assert plan.weights == weight_offsets(engine)[1] >= engine.weight_bytes
    assert plan.arena >= engine.arena and plan.slots >= 4 * (profile.slots.size + profile.upload_size)
    facts = plan.facts()
    parts = sum(facts[name] for name in ("weights", "arena", "slots", "kv"))
    assert facts["total"] == aligned(parts, PAGE) + facts["workspace"] + facts["graphs"]
    assert f"{blocks} blocks" in str(plan) and str(plan.tokens) in str(plan)


def test_weights_do_not_overlap(engine: Engine) -> None:
    offsets, end = weight_offsets(engine)
    spans = sorted((at, at + engine.weights[name].type.nbytes()) for name, at in offsets.items())
    assert all(a[1] <= b[0] for a, b in pairwise(spans)) and spans[-1][1] <= end
    assert all(at % 256 == 0 for at in offsets.values())


def test_every_bucket_reaches_as_far_into_the_arena_as_it_was_planned(engine: Engine) -> None:
    program = engine.programs["decode"]
    assert max(arena_top(engine, program, name) for name in program.buckets) == engine.arena


def test_lower_limits_take_less_and_hold_every_step_within_them(engine: Engine) -> None:
    profile = engine.profile
    low = replace(profile, max_batch_size=3, max_num_tokens=20, max_seq_len=70)
    plan, whole, keys = plan_run(engine, PLENTY, low), plan_run(engine, PLENTY), bucket_keys(profile, low)
    assert plan.blocks == (1 + 3 * 2,) and plan.arena < whole.arena and plan.graphs <= whole.graphs
    for tokens in range(1, 21):
        for logits in range(1, min(3, tokens) + 1):
            assert profile.bucket(tokens, logits) in keys
    assert len(keys) < len(bucket_keys(profile))
    assert bucket_keys(profile, profile) == bucket_keys(profile)


@pytest.mark.parametrize("limits", [None, (1, 16, 64), (2, 64, 256)])
def test_the_least_budget_is_just_enough(engine: Engine, limits: tuple[int, int, int] | None) -> None:
    names = ("max_batch_size", "max_num_tokens", "max_seq_len")
    low = replace(engine.profile, **dict(zip(names, limits, strict=True))) if limits else None
    need = least_budget(engine, low)
    plan = plan_run(engine, need, low)
    assert plan.blocks == (1 + -(-(low or engine.profile).max_seq_len // engine.profile.block_size),)
    assert plan.total <= aligned(need, PAGE)
    with pytest.raises(ResourceError, match="may be used"):
        plan_run(engine, need - 1, low)


def test_a_refusal_names_a_limit_that_helps(engine: Engine) -> None:
    block = engine.profile.block_size
    short = least_budget(engine) - engine.block_bytes
    with pytest.raises(ResourceError) as caught:
        plan_run(engine, short)
    words = str(caught.value)
    assert f"max_seq_len={engine.profile.max_seq_len}" in words and "gpu_memory_utilization or max_gpu_bytes" in words
    advised = int(words.split("lower max_seq_len to ")[1].split(",")[0])
    assert advised % block == 0
    assert plan_run(engine, short, replace(engine.profile, max_seq_len=advised)).blocks[0] > 1
    with pytest.raises(ResourceError, match="take a smaller model"):
        plan_run(engine, engine.weight_bytes // 2)
    wide = replace(engine, arena=64 << 20)
    with pytest.raises(ResourceError, match="lower max_num_tokens and max_seq_len"):
        plan_run(wide, plan_run(wide, PLENTY).total - (32 << 20))


def test_an_engine_that_calls_no_library_needs_no_workspace(engine: Engine) -> None:
    assert (plan_run(engine, PLENTY).workspace > 0) == calls_library(engine)
