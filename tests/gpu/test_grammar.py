"""Guided and plain rows side by side on a GPU."""

from __future__ import annotations

import json
import re

import pytest
import torch

from penstock import LLM, SamplingParams
from penstock.grammar import GuidedDecoding
from penstock.runtime.masks import Masker, Masks

pytestmark = pytest.mark.gpu
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["a", "b"]}
REGEX = r"[A-Z][a-z]{2,5} [0-9]{1,3}"


def test_guided_rows_among_plain_ones() -> None:
    guided = [GuidedDecoding(json=SCHEMA), GuidedDecoding(regex=REGEX), GuidedDecoding(choice=["yes", "no"])]
    prompts = [f"Call me Ishmael. {i}" for i in range(32)]
    params = [
        SamplingParams(
            temperature=1.0, seed=i, max_tokens=400, guided_decoding=guided[i % 4], logprobs=2 * (i % 2) or None
        )
        if i % 4 < 3
        else SamplingParams(temperature=0.0, max_tokens=40)
        for i in range(32)
    ]
    with LLM(device="cuda") as llm:
        plain = [llm.generate(prompts[i], params[i])[0].outputs[0] for i in range(3, 32, 4)]
        held = [SamplingParams(temperature=1.0, seed=i, max_tokens=60, guided_decoding=guided[i]) for i in range(3)]
        llm.generate(prompts[:3], held)
        assert llm.stats()["allocations"] == 0  # but the masks' own, at the first of them
        for _ in range(2):
            outputs = [each.outputs[0] for each in llm.generate(prompts, params)]
            for i, done in enumerate(outputs):
                assert i % 4 == 3 or done.finish_reason == "stop"
                if i % 4 == 0:
                    found = json.loads(done.text)
                    assert [type(found.get(name)) for name in ("a", "b")] == [int, bool] and len(found) == 2
                elif i % 4 == 1:
                    assert re.fullmatch(REGEX, done.text) and done.logprobs
                elif i % 4 == 2:
                    assert done.text in ("yes", "no")
        same = sum(one.token_ids == other.token_ids for one, other in zip(outputs[3::4], plain, strict=True))
        assert same >= 6, "other buckets round otherwise, but seldom so"
        stats = llm.stats()
        assert stats["guided_steps"] > 20
        print({k: stats[k] for k in ("guided_steps", "host_us_per_step", "late_captures", "steps_off_fast_path")})
        print("allocations, with log-probabilities", stats["allocations"])


def test_a_mask_on_the_device_is_the_mask_on_the_host() -> None:
    generator, rows = torch.Generator().manual_seed(0), [0, 1, 2, 5, 6, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    logits = torch.randn(20, 1003, generator=generator)
    masked = []
    for device in ("cpu", "cuda"):
        masker = Masker(device, 20, 1001)
        masker.bits.copy_(torch.randint(-(2**31), 2**31, masker.bits.shape, generator=generator.manual_seed(1)))
        own = logits.to(device, copy=True)
        raw = masker.apply(own, Masks(rows, [5], masker.bits))
        assert torch.equal(raw[5].cpu(), logits[5])
        masked.append(own.cpu())
    assert torch.equal(*masked) and torch.equal(masked[0][3], logits[3])
    assert masked[0][rows].isinf().float().mean() == pytest.approx(0.5, abs=0.05)
