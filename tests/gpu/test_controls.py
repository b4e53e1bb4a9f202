"""Controlled steps on the GPU: two replays for one, and what the device adjusts is what Python would."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock import LLM, SamplingParams, bundled
from penstock.formats import BF16
from penstock.formats.tolerance import tolerance
from penstock.runtime.requests import RequestOutput
from penstock.text.tokenizer import Tokenizer

pytestmark = pytest.mark.gpu
LIMITS = {"max_batch_size": 64, "max_num_tokens": 512, "max_seq_len": 512}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def llm(cache: Path) -> Iterator[LLM]:
    with LLM(device="cuda", cache_dir=cache, enable_prefix_caching=False, **LIMITS) as model:
        yield model


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    text = "\n".join(json.loads(line)["text"] for line in bundled.heldout().read_text().splitlines())
    ids = Tokenizer.from_dir(bundled.target()).encode(text)
    return [ids[i * 311 : i * 311 + 5 + 3 * i] for i in range(60)]


def run(llm: LLM, prompts: list[list[int]], params: Any) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": each} for each in prompts], params)


def tokens(outputs: list[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    "how", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.0, "min_p": 0.1}]
)
def test_whoever_asks_for_log_probabilities_gets_the_same_text(
    llm: LLM, prompts: list[list[int]], how: dict[str, float]
) -> None:
    for batch in (prompts[:1], prompts[:40]):
        common = {"max_tokens": 40, "ignore_eos": True, **how}
        plain = run(llm, batch, [SamplingParams(seed=i, **common) for i in range(len(batch))])
        before = llm.stats()["controlled_steps"]
        scored = run(llm, batch, [SamplingParams(seed=i, logprobs=3, **common) for i in range(len(batch))])
        assert llm.stats()["controlled_steps"] > before and tokens(plain) == tokens(scored)
        for output in scored:
            done = output.outputs[0]
            assert done.logprobs is not None
            for token, scores in zip(done.token_ids, done.logprobs, strict=True):
                assert sum(map(math.exp, scores.values())) < 1.001
                assert how["temperature"] > 0 or scores[token] == max(scores.values())


def test_log_probabilities_of_prompts_are_the_cpus(llm: LLM, cache: Path, prompts: list[list[int]]) -> None:
    """Longer prompts than a step has rows of logits."""
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2)
    got = run(llm, prompts, asked)
    with LLM(device="cpu", cache_dir=cache, **LIMITS) as cpu:
        want = run(cpu, prompts, asked)
    worst = 0.0
    for g, w, prompt in zip(got, want, prompts, strict=True):
        assert g.prompt_logprobs is not None and w.prompt_logprobs is not None and len(g.prompt_logprobs) == len(prompt)
        for token, ours, theirs in zip(prompt[1:], g.prompt_logprobs[1:], w.prompt_logprobs[1:], strict=True):
            assert ours is not None and theirs is not None
            if theirs[token] > -8.0:
                worst = max(worst, abs(ours[token] - theirs[token]))
    print(f"the largest difference of a prompt token's log-probability is {worst:.4f} nat")
    assert worst < 2 * tolerance(BF16).margin


def _penalised(prompt: list[int], repetition: float, presence: float, frequency: float) -> Any:
    def process(generated: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen = torch.tensor(sorted({*prompt, *generated}))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / repetition, logits[seen] * repetition)
        for token in sorted(set(generated)):
            penalty = torch.tensor(presence) + torch.tensor(frequency) * generated.count(token)
            logits[token] -= penalty
        return logits

    return process


def test_what_the_device_adjusts_is_what_python_would(llm: LLM, prompts: list[list[int]]) -> None:
    common = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}
    for prompt in prompts[:8]:
        device = SamplingParams(repetition_penalty=1.25, presence_penalty=0.5, frequency_penalty=0.25, **common)
        host = SamplingParams(logits_processors=[_penalised(prompt, 1.25, 0.5, 0.25)], **common)
        assert tokens(run(llm, [prompt], device)) == tokens(run(llm, [prompt], host))


def test_bans_hold(llm: LLM, prompts: list[list[int]]) -> None:
    ends = sorted(llm.tokenizer.eos_token_ids) if llm.tokenizer else []
    params = SamplingParams(
        temperature=0.7, seed=1, max_tokens=80, min_tokens=70, no_repeat_ngram_size=3, bad_words=("the", "God"),
        logit_bias={ends[0]: 5.0},
    )  # fmt: skip
    for prompt, output in zip(prompts[:20], run(llm, prompts[:20], params), strict=True):
        done = output.outputs[0]
        whole = [*prompt, *done.token_ids]
        first = [tuple(whole[i : i + 3]) for i in range(len(prompt) - 2)]
        later = [tuple(whole[i : i + 3]) for i in range(max(0, len(prompt) - 2), len(whole) - 2)]
        assert len(set(later)) == len(later) and not set(first) & set(later)
        assert len(done.token_ids) >= 70 and not set(done.token_ids[:69]) & set(ends)
        assert " the " not in done.text and " God " not in done.text


def test_controlled_requests_leave_their_neighbours_alone(llm: LLM, prompts: list[list[int]]) -> None:
    """Rows without controls in a controlled step sample as in a plain one of the same bucket."""
    plain = SamplingParams(temperature=0.9, seed=7, max_tokens=30, ignore_eos=True)
    odd = SamplingParams(temperature=0.9, seed=7, max_tokens=30, ignore_eos=True, repetition_penalty=1.5, logprobs=20)
    alone = tokens(run(llm, prompts[:32], plain))
    mixed = tokens(run(llm, prompts[:32], [odd if i % 2 else plain for i in range(32)]))
    assert mixed[0::2] == alone[0::2] and mixed[1::2] != alone[1::2]
    assert llm.stats()["reference_nodes"] == llm.stats()["allocations"] == 0


def test_beams_are_as_likely_as_they_say(llm: LLM, prompts: list[list[int]]) -> None:
    """Their sums, from shared and copied blocks, against those of the whole text read as one prompt; and every time."""
    asked = SamplingParams(use_beam_search=True, beam_width=4, n=3, max_tokens=90, no_repeat_ngram_size=4)
    searched = run(llm, prompts[:12], asked)
    assert [o.outputs for o in run(llm, prompts[:12], asked)] == [o.outputs for o in searched]
    reading = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    worst = 0.0
    for prompt, output in zip(prompts, searched, strict=False):
        texts = [list(each.token_ids) for each in output.outputs]
        assert len(texts) == 3 == len({tuple(text) for text in texts})
        assert [o.score for o in output.outputs] == sorted([o.score for o in output.outputs], reverse=True)  # type: ignore[type-var]
        for text, each, read in zip(texts, output.outputs, run(llm, [prompt + t for t in texts], reading), strict=True):
            assert read.prompt_logprobs is not None and each.cumulative_logprob is not None
            total = sum(
                scores[t] for t, scores in zip(text, read.prompt_logprobs[len(prompt) :], strict=True) if scores
            )
            worst = max(worst, abs(total - each.cumulative_logprob) / len(text))
    print(f"a beam's mean log-probability differs by {worst:.4f} nat at most")
    assert worst < 0.1 * tolerance(BF16).margin
    stats = llm.stats()
    assert stats["kv_cache_usage"] == stats["requests_running"] == 0
