"""Attention and position kernels, interpreted against the references, and compiled for GPUs that are not there."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import product
from math import isqrt

import pytest
import torch

from penstock.engine.device import CPU, H200, Device
from penstock.engine.program import Site
from penstock.ir.graph import tensor
from penstock.ir.op import get
from penstock.kernels.attention.ragged import Ragged
from penstock.kernels.attention.shape import Parts, Shape, Tasks, most_tiles
from penstock.kernels.registry import tactics
from penstock.kernels.rope_attention.step import Step
from penstock.kernels.tactic import Draft, KernelUse, cdiv
from tests.kernels.cases.attention import CASES, FP8, attention, kv_append, rope, rope_attention, sizes
from tests.kernels.resources import compile_problems, compiled, count
from tests.kernels.subprocess_cases import ROOT, failures

TOPIC = "tests.kernels.cases.attention"
OPS = ("attention", "rope", "kv_append", "rope_attention", "rope_append")
LONG = pytest.mark.long


@pytest.mark.parametrize("ops", [OPS[:3], OPS[3:]], ids="-".join)
def test_kernels_agree_with_the_references(ops: tuple[str, ...]) -> None:
    assert failures(TOPIC, ops, sample=True) == []


@pytest.mark.parametrize(
    "words", [("attention_stale",), ("attention_chunks",), pytest.param(("attention_chunks", "every"), marks=LONG)]
)
def test_interpreted_in_a_process_of_its_own(words: tuple[str, ...]) -> None:
    """A stale cache changes no bit; chunks behind many keys, cut and joined, agree with the reference."""
    command = [sys.executable, "-m", f"tests.kernels.interpret.{words[0]}", *words[1:]]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.long  # minutes of compiling
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_without_spills(op: str) -> None:
    assert compile_problems([case for case in CASES if case[0].op == op]) == []


def _names(draft: Draft) -> list[str]:
    return [s.kernel.source.split(":")[1] for s in draft.steps if isinstance(s, KernelUse)]


def test_prefill_of_a_real_model_uses_warpgroup_products() -> None:
    site, at = attention("bf16", 32, 8, 128), sizes(2048, 64, 64)
    plans = [Ragged().plan(site, at, H200, config) for config in Ragged().tunables(site, at, H200)]
    for plan in plans:
        used = {s.kernel.source.split(":")[1]: compiled(s.kernel) for s in plan.steps if isinstance(s, KernelUse)}
        assert count(used["prefill"], "wgmma.mma_async") >= 8
        assert count(used["decode"], "mma.sync") > 0
        # Two programs of each must fit on a multiprocessor.
        assert used["decode"].shared < 100 << 10


def test_of_a_cache_in_fp8_nothing_is_loaded_or_widened_byte_by_byte() -> None:
    """Values come two and two out of shared memory, and become f16 two at a time; to bf16 it would be one by one."""
    at = sizes(2048, 64, 64)
    for tactic, site, first in (
        (Ragged(), attention("bf16", 32, 8, 128, pool=FP8), at),
        (Step(), rope_attention("bf16", 32, 8, 128, pool=FP8), sizes(64, 64, 64)),
        (Step(), rope_attention("f16", 32, 8, 128, pool=FP8), sizes(1, 1, 64)),
    ):
        plan = tactic.plan(site, first, H200, tactic.tunables(site, first, H200)[0])
        for step in plan.steps:
            assert isinstance(step, KernelUse)
            binary = compiled(step.kernel)
            assert not count(binary, "ld.shared.b8") and not count(binary, "cvt.rn.bf16.f16")
            assert count(binary, "cvt.rn.f16x2.e4m3x2") >= 64
            if step.kernel.source.endswith(":prefill"):
                assert count(binary, "wgmma.mma_async") >= 8


def test_a_cache_in_fp8_needs_a_device_that_converts_it() -> None:
    at, older = sizes(4, 4, 4), replace(H200, capability=89)
    for site in (attention("bf16", 4, 4, 64, pool=FP8), kv_append("bf16", 4, 64, 64, pool=FP8)):
        (tactic,) = tactics(site.op)
        assert tactic.supports(site, at, H200) is None
        assert "is fp8_e4m3; compute capability 9.0 or above reads it" in str(tactic.supports(site, at, older))
    assert "read in pairs" in str(Ragged().supports(attention("bf16", 4, 4, 65, pool=FP8), at, H200))
    assert "must share one format" in str(Ragged().supports(attention("bf16", 4, 4, 64, pool="f32"), at, H200))
    in_fp8 = replace(attention("bf16", 4, 4, 64), inputs=attention(FP8, 4, 4, 64).inputs)
    assert "input 0 is fp8_e4m3" in str(Ragged().supports(in_fp8, at, H200))


def test_warps_that_work_apart_do_not_wait_for_each_other() -> None:
    """In the loop over keys: one barrier for what was loaded, and one before it is overwritten."""
    site, at = rope_attention("bf16", 32, 8, 128), sizes(1, 1, 64)
    (step,) = Step().plan(site, at, H200, Step().tunables(site, at, H200)[0]).steps
    assert isinstance(step, KernelUse)
    ptx = compiled(step.kernel).ptx.split("cp.async.wait_group")
    loop = next(part for part in ptx if "ex2.approx" in part and "mma.sync" in part)
    assert loop.split("bra")[0].count("bar.sync") == 2
    assert compiled(step.kernel).shared < 100 << 10


def test_a_step_of_single_tokens_is_one_launch() -> None:
    at = sizes(1, 1, 4)
    for tactic, site in ((Ragged(), attention("bf16", 32, 8, 128)), (Step(), rope_attention("bf16", 32, 8, 128))):
        for config in tactic.tunables(site, at, H200):
            assert _names(tactic.plan(site, at, H200, config)) == ["decode" if tactic.op == "attention" else "step"]


def test_rows_that_may_be_long_take_a_second_launch() -> None:
    for tokens, names in ((4, ["step"]), (5, ["step", "prefill"])):
        site, at = rope_attention("bf16", 32, 8, 128), sizes(tokens, tokens, 4)
        assert _names(Step().plan(site, at, H200, Step().tunables(site, at, H200)[0])) == names
    assert "1025 tokens; at most 1024" in str(Step().supports(site, sizes(1025, 4, 4), H200))


def _parts(contexts: list[int], aim: int, least: int, keys: int) -> list[int]:
    """What `find_task` makes of rows of such contexts."""
    tiles = [cdiv(c, keys) for c in contexts]
    most = max(cdiv(sum(tiles), aim), least)
    return [cdiv(t, most) for t in tiles]


@pytest.mark.parametrize("contexts", [[1], [64 * 64], [4096, 1, 1, 1], [100] * 4, [4096] * 4, [4096, 130, 0, 65]])
@pytest.mark.parametrize("least", [1, 4])
def test_the_decode_grid_holds_every_mixture_of_contexts(contexts: list[int], least: int) -> None:
    site, at = attention("bf16", 32, 8, 128), sizes(4, len(contexts), 64)
    for target in (1, 2, 8):
        tasks = Tasks.of(Shape.of(site), at, H200, {"BN": 64, "TASKS": target, "LEAST": least})
        assert sum(_parts(contexts, tasks.aim, tasks.least, 64)) <= tasks.most
        assert tasks.counters == len(contexts) * 8 * 4


def _cuts(rows: list[tuple[int, int]], parts: Parts, short: int, tile: int, keys: int, window: int) -> list[int]:
    """What `find_part` makes of rows of (queries, context): tasks of each."""
    tiles = [cdiv(n, tile) if n > short else 0 for n, _ in rows]
    if sum(tiles) >= parts.aim or not parts.cut:
        return tiles
    last = [max(0, context - (n - (t - 1) * tile) - window + 1) for t, (n, context) in zip(tiles, rows, strict=True)]
    lengths = [cdiv(c, keys) - (x // keys if window else 0) for x, (_, c) in zip(last, rows, strict=True)]
    work = sum(t * n for t, n in zip(tiles, lengths, strict=True))
    return [
        t * max(1, min(n * parts.aim // work, n // parts.least, isqrt(n * keys // 64))) if t else 0
        for t, n in zip(tiles, lengths, strict=True)
    ]


def test_the_grid_and_the_workspace_hold_every_mixture_of_chunks() -> None:
    numbers = random.Random(1)
    site, most = attention("bf16", 32, 8, 128), 0
    for tokens, sequences, blocks in ((5, 8, 4), (64, 8, 136), (128, 64, 136), (512, 64, 136), (2048, 64, 1024)):
        at = sizes(tokens, sequences, blocks)
        for config in Ragged().tunables(site, at, H200):
            parts = Parts.of(Shape.of(site), at, H200, config, 4)
            tile = config["PM"] // 4
            assert parts.most >= most_tiles(at, 4, tile)
            # Twice what runs at once, at most: here 17 MB, whatever the bucket.
            assert parts.workspace <= 2 * H200.multiprocessors * config["PTASKS"] * config["PM"] * (128 + 2) * 4 + 256
            for _ in range(200):
                left, rows = tokens, []
                while left and len(rows) < sequences:
                    n = numbers.randint(1, min(left, numbers.choice((1, 20, 300))))
                    rows.append((n, min(blocks * 64, n + numbers.choice((0, 500, 8000)))))
                    left -= n
                tasks = _cuts(rows, parts, 4, tile, config["PN"], numbers.choice((0, 700)))
                assert sum(tasks) <= parts.most
                if sum(tasks) > sum(cdiv(n, tile) for n, _ in rows if n > 4):
                    most = max(most, sum(tasks))
                    assert sum(tasks) * 8 * config["PM"] * 130 * 4 <= parts.workspace
                    assert sum(tasks) * 8 * 4 <= parts.counters
    assert most > 33


@pytest.mark.parametrize(("short", "tile"), list(product((1, 2, 4), (1, 2, 3, 8))))
def test_the_prefill_grid_holds_every_split_of_the_tokens(short: int, tile: int) -> None:
    def worst(tokens: int, rows: int) -> int:
        if not rows or not tokens:
            return 0
        counts = range(1, tokens + 1)
        return max((cdiv(n, tile) if n > short else 0) + worst(tokens - n, rows - 1) for n in counts)

    for tokens, rows in product(range(1, 11), range(1, 4)):
        assert worst(tokens, rows) <= most_tiles(sizes(tokens, rows, 1), short, tile)


def test_what_cannot_run_is_refused_with_a_reason() -> None:
    at = sizes(4, 4, 4)
    assert "blocks of 8" in str(Ragged().supports(attention("bf16", 4, 4, 64, 8), at, H200))
    assert "heads of 512" in str(Ragged().supports(attention("bf16", 4, 4, 512), at, H200))
    assert "at most 128" in str(Ragged().supports(attention("bf16", 256, 1, 64), at, H200))
    backwards = replace(attention("bf16", 4, 4, 64), attrs=(("heads", 4), ("scale", -1.0)))
    assert "only positive scales" in str(Ragged().supports(backwards, at, H200))


@pytest.mark.parametrize("device", [CPU, replace(H200, capability=75)])
def test_older_devices_and_other_formats_are_refused_with_a_reason(device: Device) -> None:
    at = sizes(4, 4, 4)
    for site in (attention("bf16", 4, 4, 64), rope("f16", 4, 64, 32), kv_append("f32", 4, 64, 64)):
        (tactic,) = tactics(site.op)
        assert tactic.supports(site, at, device) == "needs a CUDA device of compute capability 8.0 or above"
        assert "is i32; supported are f32, f16, bf16" in str(tactic.supports(_of_integers(site), at, H200))


def _of_integers(site: Site) -> Site:
    return replace(site, inputs=(replace(site.inputs[0], format=tensor("i32", 1).format), *site.inputs[1:]))


def test_an_example_of_few_tokens_is_a_prompt_beside_single_tokens() -> None:
    site, at = attention("bf16", 4, 1, 64), sizes(100, 8, 64)
    example = get("attention").example
    assert example is not None
    _, kv, start, count, context, table = example(site.inputs, dict(site.attrs), at, torch.Generator(), "cpu")
    assert count.tolist() == [1, 1, 98, 0, 0, 0, 0, 0] and start.tolist()[:3] == [0, 1, 2]
    assert context[2] == 98 and min(context[:2]) > 1000
    assert max(context) <= (table[0] > 0).sum() * kv.shape[3]
    room = {**at, "M": 1}  # a prompt too long for its blocks is cut
    _, _, _, count, context, _ = example(site.inputs, dict(site.attrs), room, torch.Generator(), "cpu")
    assert count.tolist()[:3] == [1, 1, 64] and max(context) <= 64


def test_programs_of_few_rows_are_not_made_to_share_a_multiprocessor() -> None:
    site = rope_attention("bf16", 32, 8, 128)
    for rows, warps_apart in ((1, [4]), (33, [4, 4]), (34, [1, 4, 1])):
        configs = Step().tunables(site, sizes(rows, rows, 64), H200)
        assert [c["APART"] for c in configs] == warps_apart
