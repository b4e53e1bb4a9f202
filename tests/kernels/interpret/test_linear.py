"""Products and gates, interpreted against their references."""

from __future__ import annotations

import pytest

from tests.kernels.subprocess_cases import failures


@pytest.mark.parametrize(
    "ops",
    [("linear",), ("linear_glu",), ("linear_norm_linear",), ("glu", "packed_glu"), ("linear_activate",)],
    ids="-".join,
)
def test_every_case_agrees_with_the_reference(ops: tuple[str, ...]) -> None:
    assert failures("tests.kernels.cases.linear", ops) == []
