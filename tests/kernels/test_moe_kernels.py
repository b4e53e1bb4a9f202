"""The kernels of mixtures of experts: interpreted against the references, and compiled for GPUs that are not there."""

from __future__ import annotations

import pytest

from tests.kernels.cases.moe import CASES
from tests.kernels.resources import compile_problems
from tests.kernels.subprocess_cases import failures

TOPIC = "tests.kernels.cases.moe"


@pytest.mark.parametrize("op", ["route", "moe"])
def test_agrees_with_reference(op: str) -> None:
    assert failures(TOPIC, (op,)) == []


def test_compiles() -> None:
    assert compile_problems(CASES) == []
