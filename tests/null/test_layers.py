"""How the layers of a model are said, and what a token meets of its numbers."""

from __future__ import annotations

import pytest

from penstock.cli import layers
from penstock.cli.check_report import parameters
from penstock.models import read_spec
from penstock.spec import ModelSpec
from tests.facts.tensors import published_config

# As the model cards state them, in thousand millions.
ACTIVE = {
    "Mixtral-8x7B-v0.1": 12.9, "Qwen3-30B-A3B": 3.3, "Qwen3-235B-A22B": 22, "DeepSeek-V2": 21, "DeepSeek-V3": 37,
    "dbrx-base": 36, "Qwen1.5-MoE-A2.7B-Chat": 2.7, "Llama-3.1-8B": 8.03,
}  # fmt: skip


def published(stem: str) -> ModelSpec:
    return read_spec({k: v for k, v in published_config(stem).items() if k != "quantization_config"})


@pytest.mark.parametrize("stem", ACTIVE)
def test_a_token_meets_as_much_as_the_card_says(stem: str) -> None:
    assert parameters(published(stem), of_a_token=True) / 1e9 == pytest.approx(ACTIVE[stem], rel=0.03)


def test_layers_are_said() -> None:
    assert [layers.said(each) for each in layers.facts(published("DeepSeek-V3"))] == [
        "3 of 128 heads over a latent of 512 and 64 rotated, Yarn rope, feed-forward 18432 (silu)",
        "58 of 128 heads over a latent of 512 and 64 rotated, Yarn rope, feed-forward 8 of 256 experts of 2048 (silu) "
        "and a shared one",
    ]
    assert [layers.said(each) for each in layers.facts(published("gemma-3-1b-it"))] == [
        "22 of 4 heads of 256 over 1 KV heads, window 512, feed-forward 6912 (gelu_tanh)",
        "4 of 4 heads of 256 over 1 KV heads, feed-forward 6912 (gelu_tanh)",
    ]
