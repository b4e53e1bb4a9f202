"""Kernels around latent attention, interpreted against the references, and compiled with no GPU at hand."""

from __future__ import annotations

import pytest

from penstock.engine.device import H200
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import KernelUse
from tests.kernels.cases.latent import CASES, append, attend, gate, heads, sizes
from tests.kernels.resources import compile_problems, compiled, count
from tests.kernels.subprocess_cases import failures

PUBLISHED = attend("bf16", 128, 64, 512)


def test_agree_with_the_references() -> None:
    assert failures("tests.kernels.cases.latent") == []


@pytest.mark.long  # minutes of compiling
def test_compiles_without_spills() -> None:
    of_deepseek = [
        (PUBLISHED, sizes(64, 64, 64)), (PUBLISHED, sizes(2048, 4, 64)), (append("bf16", 64, 512), sizes(8, 8, 8)),
        (heads("bf16", 128, 512, 128, 64), sizes(1, 1, 8)), (heads("bf16", 128, 128, 512), sizes(2048, 4, 8)),
        (gate("bf16", 3584), sizes(8, 8, 8)),
    ]  # fmt: skip
    assert compile_problems([*CASES, *of_deepseek]) == []


def test_a_prompt_uses_warpgroup_products() -> None:
    (tactic,) = tactics("latent_attention")
    at = sizes(2048, 4, 64)
    for config in tactic.tunables(PUBLISHED, at, H200):
        (step,) = tactic.plan(PUBLISHED, at, H200, config).steps
        assert isinstance(step, KernelUse)
        if config["PM"] == 64:
            assert count(compiled(step.kernel), "wgmma.mma_async") >= 8


def test_who_cannot() -> None:
    (tactic,) = tactics("latent_attention")
    at = sizes(4, 4, 4)
    assert "blocks of 8" in str(tactic.supports(attend("bf16", 4, 8, 24, 8), at, H200))
    assert "latents of 600" in str(tactic.supports(attend("bf16", 4, 8, 600), at, H200))
    assert "must share one format" in str(tactic.supports(attend("bf16", 4, 8, 24, pool="f32"), at, H200))
    assert "5000 sequences" in str(tactic.supports(PUBLISHED, sizes(5000, 5000, 1), H200))
