"""The kernels of mixtures of experts: interpreted against the references, compiled for GPUs that are not there, planned
for the most uneven choices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.device import CPU, H200
from penstock.engine.program import Site
from penstock.kernels.moe.mixture import Mixture
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import KernelUse
from tests.kernels.cases import moe, moe_large
from tests.kernels.resources import compile_problems
from tests.kernels.subprocess_cases import failures

MIXTRAL = moe.moe("bf16", 8, 2, 4096, 14336)


def test_agree_with_the_references() -> None:
    assert failures("tests.kernels.cases.moe") == []


@pytest.mark.long  # minutes of compiling
def test_compiles() -> None:
    assert compile_problems([*moe.CASES, *moe_large.CASES[:4], (MIXTRAL, {"T": 8192})], older=(80,)) == []


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.sampled_from([16, 32, 64, 128]))
def test_the_tiles_hold_every_choice(counts: list[int], size: int) -> None:
    """Of one expert a token, as many tokens to each expert as drawn: the bound is never passed."""
    m = Mixture.of(moe.moe("bf16", len(counts), 1, 8, 8), {"T": sum(counts)})
    assert sum(-(-count // size) for count in counts) <= m.tiles(size)


def _refusals(site: Site, tokens: int, device: Any = H200) -> dict[str, str]:
    found = {t.name: t.supports(site, {"T": tokens}, device) for t in tactics(site.op)}
    return {name: why for name, why in found.items() if why}


def test_who_runs_how_many_tokens() -> None:
    assert set(_refusals(MIXTRAL, 1)) == {"grouped", "hopper"}
    assert set(_refusals(MIXTRAL, 16)) == {"hopper"} and "32 tokens times experts" in _refusals(MIXTRAL, 16)["hopper"]
    assert set(_refusals(MIXTRAL, 64)) == {"gemv"}


@pytest.mark.parametrize(
    ("site", "tactic", "says"),
    [
        (moe.moe("f32", 8, 2, 64, 64), "hopper", "f32"),
        (moe.moe("bf16", 8, 2, 60, 64), "hopper", "rows of 60"),
        (moe.moe("bf16", 8, 2, 64, 64, **moe.CLAMPED), "hopper", "biases or activation"),
        (moe.moe("bf16", 8, 2, 64, 64, w="f32"), "grouped", "one format"),
    ],
)
def test_what_is_refused_says_why(site: Site, tactic: str, says: str) -> None:
    assert says in _refusals(site, 256)[tactic]


def test_nothing_runs_without_a_gpu_and_hopper_nowhere_else() -> None:
    assert set(_refusals(MIXTRAL, 64, CPU)) == {"gemv", "grouped", "hopper"}
    older = replace(H200, capability=80)
    assert "compute capability" in _refusals(MIXTRAL, 64, older)["hopper"]
    assert "grouped" not in _refusals(MIXTRAL, 64, older)


def test_the_grid_does_not_depend_on_the_choice() -> None:
    """Nothing about the experts chosen is baked into a launch: all of it is planned from sizes alone."""
    for tokens in (1, 64, 8192):
        for tactic in tactics("moe"):
            if tactic.supports(MIXTRAL, {"T": tokens}, H200) is None:
                for config in tactic.tunables(MIXTRAL, {"T": tokens}, H200):
                    draft = tactic.plan(MIXTRAL, {"T": tokens}, H200, config)
                    assert all(isinstance(s, KernelUse) and all(0 < g < 1 << 31 for g in s.grid) for s in draft.steps)
                    assert draft.workspace < 1 << 30 and draft.zeroed == 0
