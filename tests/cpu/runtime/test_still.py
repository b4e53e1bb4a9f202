"""Serving changes the contents of memory, never what memory there is; the GPU's share of this is in tests/gpu."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock import LLM, SamplingParams
from penstock.engine import store
from penstock.engine.manifest import Engine


def test_steps_ask_a_backend_for_nothing_but_steps(tiny_engine: Path) -> None:
    with LLM(tiny_engine, device="cpu", skip_tokenizer_init=True) as llm:
        backend, asked = llm._loop.executor.backend, set()

        class Watched:
            def __getattr__(self, name: str) -> object:
                asked.add(name)
                return getattr(backend, name)

        llm._loop.executor.backend = Watched()
        places = {name: state.data_ptr() for name, state in backend.states.items()}
        blocks, weights = backend.num_blocks, {name: w.data_ptr() for name, w in backend.weights.items()}
        params = [SamplingParams(max_tokens=3 + i % 9, seed=i, ignore_eos=True) for i in range(20)]
        llm.generate([{"prompt_token_ids": list(range(3, 4 + i * 2))} for i in range(20)], params)
        assert (
            asked <= {"launch", "read", "idle", "meanwhile", "steps_in_flight", "slow_steps"}
            and {"launch", "read"} <= asked
        )
        assert {name: state.data_ptr() for name, state in backend.states.items()} == places
        assert {name: w.data_ptr() for name, w in backend.weights.items()} == weights
        assert backend.num_blocks == blocks == (llm._loop.executor.kv.num_usable + 1,)
        llm._loop.executor.backend = backend


def test_an_engine_directory_is_read_once(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its manifest names every kernel and plan; reading and checking it twice is most of a small start."""
    reads: list[Path] = []
    plain = store.load

    def counting(directory: Path) -> Engine:
        reads.append(directory)
        return plain(directory)

    monkeypatch.setattr(store, "load", counting)
    with LLM(tiny_engine, device="cpu", skip_tokenizer_init=True) as llm:
        stats = llm.stats()
    assert reads == [tiny_engine]
    assert stats["load_seconds"]["load"] > 0 and stats["memory"] == {}
