"""Evicted prefixes in pinned memory: every bit comes back, and so does the text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from penstock import LLM, SamplingParams, bundled
from penstock.runtime.kv.host import Restored, Saved
from penstock.text.tokenizer import Tokenizer

pytestmark = pytest.mark.gpu
LIMITS = {"max_batch_size": 2, "max_num_tokens": 512, "max_seq_len": 512}
LENGTH = 300


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(device="cuda", cache_dir=tmp_path_factory.mktemp("cache"), host_cache_size=256 << 20, **LIMITS) as model:
        while model._loop.call(model._loop.executor.backend.idle):  # all captured: equal steps run in equal buckets
            continue
        yield model


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    text = "\n".join(json.loads(line)["text"] for line in bundled.heldout().read_text().splitlines())
    ids = Tokenizer.from_dir(bundled.target()).encode(text)
    return [{"prompt_token_ids": ids[i * LENGTH : (i + 1) * LENGTH]} for i in range(12)]


def test_blocks_come_back_bit_by_bit(llm: LLM) -> None:
    backend: Any = llm._loop.executor.backend
    (size,), last = backend.num_blocks, backend.host_blocks - 1
    assert backend.host_blocks == (256 << 20) // llm.engine.block_bytes and size > 8

    def there_and_back() -> None:
        kv = [state for name, state in backend.states.items() if name != "slots"]
        for state in kv:
            state.view(torch.uint8).random_()
        before = [state.clone() for state in kv]
        backend.save_blocks([Saved(1, 0), Saved(2, last), Saved(3, 1)])
        for state in kv:
            state[1:4].zero_()
        backend.save_blocks([Saved(5, 1)])
        backend.restore_blocks([Restored(last, 6), Restored(0, 7), Restored(1, 3)])
        for was, state in zip(before, kv, strict=True):
            for source, target in ((2, 6), (1, 7), (5, 3)):
                assert torch.equal(state[target].view(torch.uint8), was[source].view(torch.uint8))
            assert torch.equal(state[8:].view(torch.uint8), was[8:].view(torch.uint8)) and not state[1:3].any()
            state.zero_()

    llm._loop.call(there_and_back)


def test_a_prefix_evicted_by_others_gives_the_same_text(llm: LLM, prompts: list[dict[str, Any]]) -> None:
    """With what is found on the device, and with what comes back from the host: the same steps, so the same bits."""
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=4)
    full = LENGTH - LENGTH % llm.engine.profile.block_size
    llm.generate(prompts[0], params)
    before = llm.stats()
    found = llm.generate(prompts[0], params)[0]
    assert found.metrics.reused_tokens == full and llm.stats()["host_cache_hits"] == before["host_cache_hits"]
    for _ in range(2):
        for other in prompts[1:]:
            llm.generate(other, params)
        hits = llm.stats()["host_cache_hits"]
        again = llm.generate(prompts[0], params)[0]
        assert llm.stats()["host_cache_hits"] == hits + full and again.metrics.reused_tokens == full
        assert again.outputs == found.outputs
    stats = llm.stats()
    assert stats["allocations"] == before["allocations"] and stats["reference_nodes"] == 0
    assert 0 < stats["host_cache_usage"] <= 1


def test_two_at_a_time_and_back_and_forth(llm: LLM, prompts: list[dict[str, Any]]) -> None:
    """Two steps in flight, blocks that go out and come back in the same plans."""
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=70, ignore_eos=True)
    llm.generate(prompts, params)
    first, second = (llm.generate(prompts, params) for _ in range(2))
    assert [each.outputs for each in first] == [each.outputs for each in second]
    assert all(each.metrics.reused_tokens for each in second)
