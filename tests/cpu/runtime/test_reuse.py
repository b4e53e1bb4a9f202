"""KV found again, and requests computed anew for want of blocks: the tokens are those of each request alone."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock import LLM, SamplingParams
from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.errors import OptionError, QueueFullError
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.requests import RequestOutput
from penstock.runtime.step import CpuBackend

HEAD = tuple(range(2, 140))  # two full blocks of 64, and some


def _damp(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    """A function on the host, by what was generated."""
    logits[tokens] -= 2.0
    return logits


KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.3},
    {"prompt_logprobs": 1, "no_repeat_ngram_size": 2},
    {"logits_processors": [_damp]},
    {"n": 2, "temperature": 0.9, "min_p": 0.05},
)


@pytest.fixture
def small(tiny_engine: Path) -> Iterator[tuple[Engine, CpuBackend]]:
    engine = store.load(tiny_engine)
    yield engine, CpuBackend(engine, tiny_engine)


def _run(
    loaded: tuple[Engine, CpuBackend], prompts: list[tuple[int, ...]], reuse: bool, blocks: int, tokens: int = 30,
    kinds: bool = False,
) -> tuple[list[Any], Executor]:  # fmt: skip
    """What each got, and the executor. `kinds`: of requests that steps treat differently, one after another."""
    engine, backend = loaded
    layout, slots = engine.profile.slots, backend.states["slots"]
    slots[layout.controls_at :] = torch.arange(slots.numel() - layout.controls_at) % 250  # of somebody before
    backend.num_blocks = (blocks,)
    executor, done = Executor(engine, backend, None, reuse=reuse), queue.SimpleQueue[RequestOutput]()
    for i, prompt in enumerate(prompts):
        common = {"temperature": 0.8 * (i % 2), "seed": i, "max_tokens": tokens, "ignore_eos": True}
        params = SamplingParams(**{**common, **(KINDS[i % len(KINDS)] if kinds else {})})
        executor.submit(Submission(str(i), prompt, params, done.put))  # type: ignore[arg-type]
    while executor.busy:
        executor.step()
    executor.scheduler.check()
    outputs = sorted((done.get() for _ in prompts), key=lambda output: int(output.request_id))
    return [_said(output) for output in outputs], executor


def _said(output: RequestOutput) -> Any:
    """Tokens, and log-probabilities as far as they do not depend on the order of sums."""
    if output.prompt_logprobs is None:
        return [each.token_ids for each in output.outputs]
    scores = [
        round(each[token], 3)
        for token, each in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        if each
    ]
    return [each.token_ids for each in output.outputs], scores


TAILS = st.lists(
    st.tuples(st.integers(0, len(HEAD)), st.lists(st.integers(2, 299), max_size=40)), min_size=2, max_size=6
)


@given(TAILS, st.integers(5, 9), st.integers(1, 2), st.booleans())
@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reuse_and_preemption_change_no_token(
    small: tuple[Engine, CpuBackend], tails: list[tuple[int, list[int]]], blocks: int, in_flight: int, kinds: bool
) -> None:
    prompts = [(*HEAD[:head], *tail, 7) for head, tail in tails]
    small[1].steps_in_flight = in_flight
    together, _ = _run(small, prompts, True, blocks, kinds=kinds)
    small[1].steps_in_flight = 1
    alone = [_run(small, [*[(7,)] * i, prompt], False, 40, kinds=kinds)[0][i] for i, prompt in enumerate(prompts)]
    assert together == alone


def test_both_happen_in_a_small_pool(small: tuple[Engine, CpuBackend]) -> None:
    prompts = [(*HEAD[:66], 100 + i) for i in range(4)]
    plain, wide = _run(small, prompts, reuse=False, blocks=40, tokens=150)
    same, narrow = _run(small, prompts, reuse=True, blocks=9, tokens=150)
    assert same == plain
    counters = narrow.scheduler.counters
    assert counters.preemptions > 0 and counters.reused_tokens == 3 * 64 and counters.asked_tokens == 4 * 67
    assert wide.scheduler.counters.preemptions == wide.scheduler.counters.reused_tokens == 0


def test_the_llm_says_what_it_found(tiny_model: Path, cache: Path) -> None:
    params = SamplingParams(max_tokens=2, temperature=0.0)
    with LLM(tiny_model, device="cpu", cache_dir=cache, skip_tokenizer_init=True) as llm:
        first, second = (llm.generate({"prompt_token_ids": HEAD}, params)[0] for _ in range(2))
        assert first.outputs == second.outputs
        assert (first.metrics.reused_tokens, second.metrics.reused_tokens) == (0, 128)
        stats = llm.stats()
        assert (stats["prefix_cache_queries"], stats["prefix_cache_hits"]) == (2 * len(HEAD), 128)
        assert stats["kv_cache_usage"] == stats["kv_cache_waste"] == stats["preemptions"] == 0
        times = second.metrics
        parts = (times.queue_time, times.prefill_time, times.decode_time)
        assert times.latency == pytest.approx(sum(x for x in parts if x is not None)) and None not in parts
    with LLM(tiny_model, device="cpu", cache_dir=cache, skip_tokenizer_init=True, enable_prefix_caching=False) as llm:
        llm.generate([{"prompt_token_ids": HEAD}] * 2, params)
        assert llm.stats()["prefix_cache_hits"] == 0


def test_a_full_queue_is_a_typed_refusal(tiny_model: Path, cache: Path) -> None:
    given = {"device": "cpu", "cache_dir": cache, "skip_tokenizer_init": True}
    for wrong in ({"max_num_queued_reqs": 0}, {"max_num_queued_tokens": 1.5}, {"enable_prefix_caching": 1}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            LLM(tiny_model, **given, **wrong)  # type: ignore[arg-type]
    with LLM(tiny_model, max_num_queued_reqs=2, **given) as llm:  # type: ignore[arg-type]
        prompts = [{"prompt_token_ids": [5, 6, 7 + i]} for i in range(3)]
        with pytest.raises(QueueFullError, match="max_num_queued_reqs=2; try again later"):
            llm.generate(prompts, SamplingParams(max_tokens=2))
        assert len(llm.generate(prompts[:2], SamplingParams(max_tokens=2))) == 2
