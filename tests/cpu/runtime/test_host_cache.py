"""Evicted prefixes kept in the host's memory: found again, with the tokens of a run that never had them."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock import LLM, SamplingParams
from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.errors import ExecutorError, OptionError, PenstockError, ResourceError
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.open import RunLimits
from penstock.runtime.requests import RequestOutput
from penstock.runtime.step import CpuBackend

HEADS = [[2 + (7 * i + j * (3 + 2 * i)) % 290 for j in range(138)] for i in range(4)]  # two full blocks of 64, and some
HOST_BLOCKS = 6
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
Prompt = tuple[int, ...]


@pytest.fixture(scope="module")
def loaded(tiny_engine: Path) -> Iterator[tuple[Engine, CpuBackend]]:
    engine = store.load(tiny_engine)
    yield engine, CpuBackend(engine, tiny_engine, host_blocks=HOST_BLOCKS)


def _run(
    loaded: tuple[Engine, CpuBackend], batches: list[list[Prompt]], blocks: int, host_blocks: int, in_flight: int = 1
) -> tuple[list[Any], Executor]:
    """The tokens, or the error, of each prompt; a batch begins when the one before has ended."""
    engine, backend = loaded
    backend.num_blocks, backend.host_blocks, backend.steps_in_flight = (blocks,), host_blocks, in_flight
    executor, results = Executor(engine, backend, None), []
    for batch in batches:
        done = [queue.SimpleQueue[RequestOutput | PenstockError]() for _ in batch]
        for i, prompt in enumerate(batch):
            params = SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=20, ignore_eos=True)
            executor.submit(Submission(f"{len(results)}-{i}", prompt, params, done[i].put))  # type: ignore[arg-type]
        while executor.busy:
            executor.step()
        executor.scheduler.check()
        heard = [each.get() for each in done]
        results += [each.outputs[0].token_ids if isinstance(each, RequestOutput) else each for each in heard]
    return results, executor


def test_a_prefix_evicted_by_others_is_found_again(tiny_model: Path, cache: Path) -> None:
    given: dict[str, Any] = {"device": "cpu", "cache_dir": cache, "skip_tokenizer_init": True}
    limits = {"max_batch_size": 1, "max_num_tokens": 24, "max_seq_len": 200}  # a pool of four blocks
    prompts = [{"prompt_token_ids": HEADS[i]} for i in (0, 1, 0, 2, 3, 1)]
    with LLM(tiny_model, **given, **limits) as llm:
        plain = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
        size = llm.engine.block_bytes
        stats = llm.stats()
        assert stats["host_cache_blocks"] == stats["host_cache_hits"] == stats["host_cache_usage"] == 0
    with LLM(tiny_model, **given, **limits, host_cache_size=9 * size - 1) as llm:
        kept = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
        stats = llm.stats()
    assert [output.outputs for output in kept] == [output.outputs for output in plain]
    assert [output.metrics.reused_tokens for output in kept] == [0, 0, 128, 0, 0, 128]
    assert sum(output.metrics.reused_tokens for output in plain) < 256
    assert stats["host_cache_blocks"] == 8 and 0.5 < stats["host_cache_usage"] <= 1
    assert 128 <= stats["host_cache_hits"] <= stats["prefix_cache_hits"] == 256


PROMPTS = st.tuples(st.integers(0, 3), st.integers(1, 138), st.integers(2, 299)).map(
    lambda each: (*HEADS[each[0]][: each[1]], each[2])
)


@given(
    st.lists(st.lists(PROMPTS, min_size=1, max_size=4), min_size=2, max_size=5),
    st.integers(5, 8),
    st.integers(1, HOST_BLOCKS),
    st.integers(1, 2),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_changes_no_token(
    loaded: tuple[Engine, CpuBackend], batches: list[list[Prompt]], blocks: int, host_blocks: int, in_flight: int
) -> None:
    kept, _ = _run(loaded, batches, blocks, host_blocks, in_flight)
    plain, _ = _run(loaded, batches, 40, 0)
    assert kept == plain


ROUND = [[(*HEADS[i], 5)] for i in (0, 1, 2, 0, 1, 2)]


def test_prefixes_come_and_go_in_a_tiny_pool(loaded: tuple[Engine, CpuBackend]) -> None:
    kept, executor = _run(loaded, ROUND, 5, HOST_BLOCKS)
    assert kept == _run(loaded, ROUND, 40, 0)[0] and executor.kv.num_restored >= 5
    assert executor.scheduler.counters.reused_tokens == 3 * 128


@pytest.mark.parametrize("name", ["save_blocks", "restore_blocks"])
def test_a_copy_that_fails_ends_its_step_and_is_not_believed(
    loaded: tuple[Engine, CpuBackend], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    batches = [*ROUND[:4], *ROUND[:4]]
    plain, real, calls = _run(loaded, batches, 40, 0)[0], getattr(CpuBackend, name), []

    def fails(self: CpuBackend, pairs: Any) -> None:
        calls.append(pairs)
        if len(calls) == 1:
            for _, state, host in self._kv:  # it got as far as to spoil them
                (host if name == "save_blocks" else state)[[target for _, target, _ in pairs]] = 9.0
            raise RuntimeError("the bus is down")
        real(self, pairs)

    monkeypatch.setattr(CpuBackend, name, fails)
    kept, _ = _run(loaded, batches, 5, HOST_BLOCKS)
    failed = [i for i, each in enumerate(kept) if isinstance(each, ExecutorError)]
    assert len(failed) == 1 and len(calls) > 1 and "the bus is down" in str(kept[failed[0]])
    assert [t for i, t in enumerate(kept) if i not in failed] == [t for i, t in enumerate(plain) if i not in failed]


def test_sizes_that_cannot_be_are_refused(tiny_engine: Path, cache: Path) -> None:
    given: dict[str, Any] = {"device": "cpu", "cache_dir": cache, "skip_tokenizer_init": True}
    for wrong in (-1, 1.5, True, "8G", None):
        with pytest.raises(OptionError, match=r"host_cache_size=.* no integer from 0; give bytes"):
            LLM(tiny_engine, host_cache_size=wrong, **given)  # type: ignore[arg-type]
    block = store.load(tiny_engine).block_bytes
    with pytest.raises(OptionError, match=f"host_cache_size={block - 1} is less than a KV block of {block} bytes"):
        LLM(tiny_engine, host_cache_size=block - 1, **given)
    with pytest.raises(OptionError, match="enable_prefix_caching=False never asks for"):
        LLM(tiny_engine, host_cache_size=block, enable_prefix_caching=False, **given)
    with pytest.raises(ResourceError, match=r"host_cache_size=\d+ is more than the \d+ bytes of this host"):
        LLM(tiny_engine, host_cache_size=1 << 60, **given)
    assert RunLimits(host_cache_size=3 * block - 1).host_blocks(store.load(tiny_engine)) == 2
