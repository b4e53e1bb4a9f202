"""The small kernels, interpreted, against the references."""

from __future__ import annotations

from tests.kernels.subprocess_cases import failures


def test_agree_with_the_references() -> None:
    assert failures("tests.kernels.cases.small") == []
