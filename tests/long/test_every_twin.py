"""All configurations of the twins as engines: ragged prompts in mixed, chunked steps, equal to Transformers'."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cpu.engines.driven import (
    NEW,
    PROMPTS,
    assert_same,
    difference,
    generated,
    judged,
    prompts_of,
    twin_engine,
)
from tests.cpu.models.twins import CASES
from tests.long import results

pytestmark = pytest.mark.long

# A rope by request changes at its original length, which for dynamic ropes is the config's number of positions.
CHANGES: dict[str, dict[str, Any]] = {
    "llama-dynamic-above": {"max_position_embeddings": 100},
    "llama-longrope-both": {"max_position_embeddings": 256},
}
# Where the rope changes within a text, generate keeps the older keys turned by other angles: no judge of a request's
# own rope, and so one whole pass decides alone.
CHANGING = (
    "llama-dynamic-above", "llama-longrope-both", "llama-longrope-short", "llama-longrope-long", "phi3-longrope-short",
    "phi3-longrope-long",
)  # fmt: skip
# A cache that should keep the last window - 1 = 0 positions keeps all of them: keys[-0:].
MISKEPT = ("mistral-window-1",)
LIMITED = ("mamba2-limited-steps",)  # generate limits steps in the prompt, and not behind it
WINDOWS = (63, 64, 65, 100)  # on both sides of a block's border, shorter than the longest prompt


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Any]]:
    cases: dict[str, Any] = {}
    yield cases
    results.write("twins", prompts=PROMPTS, new_tokens=NEW, cases=cases)


@pytest.mark.parametrize("case", CASES)
def test_ragged_prompts(case: str, tmp_path: Path, found: dict[str, Any]) -> None:
    found[case] = compare(case, tmp_path, CHANGES.get(case), case not in (*CHANGING, *MISKEPT, *LIMITED))


@pytest.mark.parametrize("window", WINDOWS)
def test_windows_around_a_block(window: int, tmp_path: Path, found: dict[str, Any]) -> None:
    found[f"mistral-window of {window}"] = compare("mistral-window", tmp_path, {"sliding_window": window}, True)


def compare(case: str, folder: Path, changes: dict[str, Any] | None, by_generate: bool) -> dict[str, Any]:
    start = time.perf_counter()
    twin = twin_engine(case, folder, changes)
    worst = 0.0
    for ours in twin.greedy(prompts_of(PROMPTS)):
        assert len(ours.tokens) == NEW
        theirs = [judged(twin.model, ours)]
        if by_generate:
            theirs.append(generated(twin.model, ours.prompt))
        for each in theirs:
            assert_same(ours, each)
            worst = max(worst, difference(ours, each))
    return {"worst_logit_difference": worst, "by_generate": by_generate, "seconds": time.perf_counter() - start}
