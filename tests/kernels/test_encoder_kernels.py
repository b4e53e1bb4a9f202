"""Kernels of encoder-decoders, interpreted against the references, and compiled for GPUs that are not there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.engine.device import CPU, H200
from penstock.engine.program import KernelLaunch
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import frozen_plan
from tests.kernels.cases.encoder import CASES, FP8, cross_attention, encoder_attention, sizes
from tests.kernels.resources import compile_problems
from tests.kernels.subprocess_cases import failures

OPS = ("encoder_attention", "cross_attention", "prefix_attention", "prefix_rope")


def test_kernels_agree_with_the_references() -> None:
    assert failures("tests.kernels.cases.encoder", sample=True) == []


@pytest.mark.long  # minutes of compiling
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_without_spills(op: str) -> None:
    assert compile_problems([case for case in CASES if case[0].op == op]) == []


def test_the_grid_holds_every_split_of_the_tokens() -> None:
    (tactic,) = tactics("encoder_attention")
    site, at = encoder_attention("bf16", 4, 64), sizes(40, 12, 2)
    for config in tactic.tunables(site, at, H200):
        (launch,) = frozen_plan("whole", tactic.plan(site, at, H200, config), 90).launches
        assert isinstance(launch, KernelLaunch) and launch.grid[1] == 4
        tile = config["QT"]
        for rows in range(13):  # most of a token each, and the rest in one, or as padding
            tiles = rows + -(-(40 - rows) // tile)
            assert tiles <= launch.grid[0]


def test_what_cannot_run_is_refused_with_a_reason() -> None:
    at = sizes(4, 4, 4)
    for site in (encoder_attention("bf16", 2, 512), cross_attention("bf16", 2, 2, 512)):
        (tactic,) = tactics(site.op)
        assert tactic.supports(site, at, H200) == "heads of 512 numbers; at most 256"
        assert "capability 8.0 or above" in str(tactic.supports(site, at, CPU))
        assert "5000 sequences; at most 4096" in str(
            tactic.supports(encoder_attention("bf16", 2, 64), sizes(5000, 5000, 1), H200)
        )
    (tactic,) = tactics("cross_attention")
    narrow = cross_attention("bf16", 2, 2, 64, pool=FP8)
    assert tactic.supports(narrow, at, H200) is None
    assert "9.0 or above reads it" in str(tactic.supports(narrow, at, replace(H200, capability=89)))
    assert "share one format" in str(tactic.supports(cross_attention("bf16", 2, 2, 64, pool="f32"), at, H200))
