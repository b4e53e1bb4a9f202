"""The benchmark of mixtures, as far as it needs no GPU: what it would time, and against how many bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from penstock.bench.moe import MODELS, TOKENS, Bench
from penstock.compiler.workers import Workshop
from penstock.engine.device import H200

KEPT = Path(__file__).parents[3] / "bench" / "results" / "h200" / "moe.json"


class _Shop:
    device = H200


def test_an_expert_is_three_matrices() -> None:
    assert MODELS["mixtral-8x7b"].expert_bytes == 3 * 4096 * 14336 * 2
    assert MODELS["qwen3-30b-a3b"].expert_bytes == 3 * 2048 * 768 * 2


@pytest.mark.parametrize("name", MODELS)
def test_every_count_of_tokens_has_tactics_to_time(name: str) -> None:
    bench = Bench(cast(Workshop, _Shop()), TOKENS)
    for tokens in TOKENS:
        for site in (MODELS[name].route, MODELS[name].moe):
            found = [what.split("{")[0] for what, _ in bench.drafts(site, tokens)]
            assert found and "reference" not in found, (site.key, tokens)


def test_what_is_kept_covers_every_count() -> None:
    records: list[dict[str, Any]] = json.loads(KEPT.read_text())
    layers = {(r["model"], r["metric"]): r for r in records if r["metric"].startswith("layer_us_")}
    assert set(layers) == {(name, f"layer_us_{tokens}") for name in MODELS for tokens in TOKENS}
    assert all(r["environment"]["device"] == "NVIDIA H200" and r["commit"] for r in records)
    assert all(0 < r["share_of_roof"] < 1.1 for r in layers.values())
