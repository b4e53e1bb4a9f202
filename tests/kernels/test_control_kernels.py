"""Adjusted logits and log-probabilities: the kernels compile without spills and agree with the references."""

from __future__ import annotations

import pytest

from penstock.engine.device import CPU, H200
from penstock.ir.ops.state import SlotLayout
from penstock.kernels.registry import tactics
from tests.kernels.cases.control import GPU_CASES, adjust, logprobs
from tests.kernels.resources import compile_problems
from tests.kernels.subprocess_cases import failures


def test_compiles_without_spills() -> None:
    assert compile_problems(GPU_CASES) == []


def test_agree_with_the_references() -> None:
    assert failures("tests.kernels.cases.control") == []


@pytest.mark.parametrize("op", [adjust, logprobs])
def test_limits_are_named(op) -> None:
    def refusals(site, device=H200) -> list[str | None]:
        return [t.supports(site, {"L": 1}, device) for t in tactics(site.op)]

    assert refusals(op(9, SlotLayout(2, 8, 2)), CPU) == ["needs a CUDA device"]
    assert refusals(op(1 << 20, SlotLayout(2, 8, 2))) == ["a vocabulary of 1048576 tokens; at most 524288"]
    assert refusals(op(9, SlotLayout(1, 1 << 21, 2))) == ["histories of 2097152 tokens; at most 1048576"]
    assert refusals(op(9, SlotLayout(1 << 14, 1 << 17, 2))) == ["2164391936 numbers in the slots; positions are 32-bit"]
