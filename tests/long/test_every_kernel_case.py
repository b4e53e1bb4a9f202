"""All runs of the interpreted kernels, where `make test` makes a sample (tests/kernels/subprocess_cases.py)."""

from __future__ import annotations

import pytest

from tests.kernels.subprocess_cases import results
from tests.long import results as kept

TOPICS = ("attention", "encoder", "extras")


@pytest.mark.long  # minutes of interpreting
@pytest.mark.parametrize("topic", TOPICS)
def test_every_case_agrees_with_its_reference(topic: str) -> None:
    found = results(f"tests.kernels.cases.{topic}", (), sample=False, seconds=3600)
    wrong = [line for line in found if line["error"]]
    kept.write(f"kernel_cases_{topic}", runs=len(found), wrong=wrong)
    assert wrong == []
