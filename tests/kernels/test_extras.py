"""Biases and sinks of attention, and rotation of neighbours: against the references, and compiled without a GPU."""

from __future__ import annotations

import pytest

from tests.kernels.cases.extras import CASES
from tests.kernels.resources import compile_problems
from tests.kernels.subprocess_cases import failures

OPS = ("attention", "rope_attention", "rope_append", "rope")


def test_kernels_agree_with_the_references() -> None:
    assert failures("tests.kernels.cases.extras", sample=True) == []


@pytest.mark.long  # minutes of compiling
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_without_spills(op: str) -> None:
    assert compile_problems([case for case in CASES if case[0].op == op], older=(80,)) == []
