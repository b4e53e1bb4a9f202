"""Attention and position kernels, interpreted against the references, and compiled for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest

from penstock.engine.device import CPU, H200, Device
from penstock.engine.program import Site
from penstock.ir.graph import tensor
from penstock.kernels.attention.ragged import Ragged, most_tiles
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import KernelUse, cdiv
from tests.kernels.cases.attention import CASES, attention, kv_append, rope, sizes
from tests.kernels.resources import compile_problems, compiled, count
from tests.kernels.subprocess_cases import ROOT, failures

TOPIC = "tests.kernels.cases.attention"
OPS = ("attention", "rope_append", "rope", "kv_append")


@pytest.mark.parametrize("op", OPS)
def test_kernels_agree_with_the_references(op: str) -> None:
    assert failures(TOPIC, (op,)) == []


def test_stale_cache_changes_no_bit() -> None:
    command = [sys.executable, "-m", "tests.kernels.interpret.attention_stale"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_without_spills(op: str) -> None:
    assert compile_problems([case for case in CASES if case[0].op == op]) == []


def test_prefill_of_a_real_model_uses_warpgroup_products() -> None:
    site, at = attention("bf16", 32, 8, 128), sizes(2048, 64, 64)
    plans = [Ragged().plan(site, at, H200, config) for config in Ragged().tunables(site, at, H200)]
    for plan in plans:
        used = {s.kernel.source.split(":")[1]: compiled(s.kernel) for s in plan.steps if isinstance(s, KernelUse)}
        assert count(used["prefill"], "wgmma.mma_async") >= 8
        assert count(used["decode"], "mma.sync") > 0
        # Two decode programs must fit on a multiprocessor.
        assert used["decode"].shared < 100 << 10


def test_a_step_of_single_tokens_launches_no_prefill() -> None:
    site = attention("bf16", 32, 8, 128)
    config = Ragged().tunables(site, sizes(1, 1, 4), H200)[0]
    names = [
        s.kernel.source.split(":")[1]
        for s in Ragged().plan(site, sizes(1, 1, 4), H200, config).steps
        if isinstance(s, KernelUse)
    ]
    assert names == ["decode", "combine"]


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


@pytest.mark.parametrize("device", [CPU, replace(H200, capability=75)])
def test_older_devices_and_other_formats_are_refused_with_a_reason(device: Device) -> None:
    at = sizes(4, 4, 4)
    for site in (attention("bf16", 4, 4, 64), rope("f16", 4, 64, 32), kv_append("f32", 4, 64, 64)):
        (tactic,) = tactics(site.op)
        assert tactic.supports(site, at, device) == "needs a CUDA device of compute capability 8.0 or above"
        assert "is i32; supported are f32, f16, bf16" in str(tactic.supports(_of_integers(site), at, H200))


def _of_integers(site: Site) -> Site:
    return replace(site, inputs=(replace(site.inputs[0], format=tensor("i32", 1).format), *site.inputs[1:]))
