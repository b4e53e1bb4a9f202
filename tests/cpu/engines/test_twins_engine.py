"""Every family and rope scaling as an engine: built with all passes, run by the executor, equal to Transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.engine.manifest import Engine
from tests.cpu.engines.driven import NEW, PROMPTS, assert_same, generated, judged, prompts_of, twin_engine

# 70: a window that reaches into the block before, and is shorter than the longest prompt.
TOGETHER: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral-window", {"sliding_window": 70}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 70, "num_hidden_layers": 2}),
    "gemma3": ("gemma3-linear", {"sliding_window": 70}),
    "phi3": ("phi3-partial-tied", {"sliding_window": 70}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "cohere": ("cohere-qk-norm-untied", {}),
    "cohere2": ("cohere2-types-biases", {"sliding_window": 70}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "qwen": ("qwen", {}),
    "baichuan": ("baichuan2-13b", {}),
    "chatglm": ("chatglm", {}),
    "linear": ("llama-linear", {}),
    "llama3": ("llama-llama3", {}),
    "yarn": ("llama-yarn", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("neox", {}),
    "gptj": ("gptj", {}),
    "opt": ("opt-350m", {}),
    "phi": ("phi", {}),
    "starcoder2": ("starcoder2-window", {"sliding_window": 70}),
    "falcon": ("falcon-groups", {}),
    "falcon-rw": ("falcon-rw", {}),
    "bloom": ("bloom", {}),
    "mpt": ("mpt-storywriter", {"max_seq_len": 256}),
    "bigcode": ("bigcode", {}),
}


def operations(engine: Engine) -> set[str]:
    return {node.op for node in engine.programs["decode"].phases["forward"].graph.nodes}


@pytest.mark.parametrize(("case", "changes"), TOGETHER.values(), ids=TOGETHER)
def test_ragged_prompts_say_what_generate_says(case: str, changes: dict[str, Any], tmp_path: Path) -> None:
    twin = twin_engine(case, tmp_path, changes)
    fused = {"rope_attention", "linear_glu", "dense_block", "split"}
    assert fused & operations(twin.engine), "the passes are meant to have fused"
    for ours in twin.greedy(prompts_of(PROMPTS)):
        assert len(ours.tokens) == NEW
        assert_same(ours, generated(twin.model, ours.prompt))


@pytest.mark.parametrize(
    ("case", "positions", "length"),
    [
        ("llama-dynamic-below", 256, 65),
        ("llama-dynamic-above", 100, 65),
        ("llama-longrope-short", 128, 61),
        ("llama-longrope-long", 256, 65),
    ],
)
def test_a_rope_fixed_by_request_says_what_one_whole_pass_says(
    case: str, positions: int, length: int, tmp_path: Path
) -> None:
    """Above the original length generate itself turns older keys by other angles than newer ones, so it is no judge
    there: one pass over the whole text is, and decides every token by induction."""
    twin = twin_engine(case, tmp_path, {"max_position_embeddings": positions})
    (ours,) = twin.greedy(prompts_of([length]))
    assert len(ours.tokens) == NEW
    assert_same(ours, judged(twin.model, ours))
    if case != "llama-dynamic-above":
        twin.model(twin.model.dummy_inputs["input_ids"], use_cache=False)  # dynamic rope remembers the longest text
        assert_same(ours, generated(twin.model, ours.prompt))
