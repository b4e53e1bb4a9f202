"""The small kernels compile with no GPU at hand, without spills."""

from __future__ import annotations

from tests.kernels.cases.small import CASES
from tests.kernels.resources import compile_problems


def test_compiles_without_spills() -> None:
    assert compile_problems(CASES) == []
