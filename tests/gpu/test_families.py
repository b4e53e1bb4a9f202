"""Every family on the GPU, with random weights and every size small: decoding and scoring as the CPU does both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock import LLM, SamplingParams, bundled
from penstock.formats import BF16
from penstock.formats.tolerance import tolerance
from tests.shrunk import SHRUNK, VOCABULARY, shrunk

pytestmark = pytest.mark.gpu
LIMITS: dict[str, Any] = {"max_batch_size": 8, "max_num_tokens": 128, "max_seq_len": 256, "weights": "random"}
PROMPTS, NEW = (5, 33, 70, 128), 40  # lengths: one block and several, shorter and longer than the windows
DECODED = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, logprobs=1)
SCORED = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
# Where rounding decides: which expert of two as good, or which key, where random norms about two make scores sharp.
CHAOTIC = {
    "gemma3_text",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "dbrx",
    "grok-1",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_next",
}

Scores = list[list[float]]  # of each text, the log-probability of each token but the first


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in PROMPTS]


def decoded(llm: LLM) -> tuple[list[list[int]], Scores]:
    """Greedy texts, prompts included, and the scores of what was decoded."""
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts()], DECODED)
    texts = [[*p, *o.outputs[0].token_ids] for p, o in zip(prompts(), outputs, strict=True)]
    steps = [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]
    return texts, [[row[t] for t, row in zip(ids, rows, strict=True)] for ids, rows in steps if rows is not None]


def scored(llm: LLM, texts: Sequence[Sequence[int]]) -> Scores:
    outputs = llm.generate([{"prompt_token_ids": list(t)} for t in texts], SCORED)
    rows = [o.prompt_logprobs or [] for o in outputs]
    return [
        [row[t] for t, row in zip(text[1:], r[1:], strict=True) if row] for text, r in zip(texts, rows, strict=True)
    ]


def differences(ours: Scores, theirs: Scores) -> torch.Tensor:
    pairs = [zip(a, b[len(b) - len(a) :], strict=True) for a, b in zip(ours, theirs, strict=True)]
    return torch.tensor([abs(a - b) for pair in pairs for a, b in pair])


@pytest.mark.parametrize("family", SHRUNK)
def test_the_gpu_decodes_and_scores_as_the_cpu(family: str, tmp_path: Path) -> None:
    """Where rounding to 16 bits decides between experts or keys, all that follows differs: then half of the scores must
    be close in bfloat16, and every one in float32."""
    model = tmp_path / family
    model.mkdir()
    (model / "config.json").write_text(json.dumps(shrunk(family)))
    shutil.copy(bundled.target() / "tokenizer.json", model)  # nobody reads the text
    check(family, model, "bfloat16", 2 * tolerance(BF16).margin, 0.5 if family in CHAOTIC else 1.0)
    if family in CHAOTIC:
        check(family, model, "float32", 1e-3, 1.0)


def check(family: str, model: Path, dtype: str, limit: float, share: float) -> None:
    """Of the scores at least a `share` is less than `limit` apart, in nats."""
    cache = model / dtype
    with LLM(model, device="cuda", dtype=dtype, cache_dir=cache / "cuda", **LIMITS) as llm:
        texts, steps = decoded(llm)
        prompt = scored(llm, texts)
    with LLM(model, device="cpu", dtype=dtype, cache_dir=cache / "cpu", **LIMITS) as cpu:
        truth = scored(cpu, texts)
    for way, ours in {"decoded": steps, "scored": prompt}.items():
        apart = differences(ours, truth)
        close = (apart < limit).double().mean().item()
        said = f"{apart.mean():.5f} nat apart, at most {apart.max():.5f}; {100 * close:.1f} % close"
        print(f"{family} {dtype} {way}: {said}")
        assert close >= share
