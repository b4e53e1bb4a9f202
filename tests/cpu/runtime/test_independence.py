"""A request's tokens do not depend on its neighbours, blocks, chunks, or when it joined: exactly, in float32."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.requests import RequestOutput, SamplingParams
from penstock.runtime.step import CpuBackend


@dataclass(frozen=True)
class Job:
    """A request, and the step at which it arrives."""

    prompt: tuple[int, ...]
    temperature: float
    seed: int
    tokens: int
    joins: int


JOBS = st.builds(
    Job,
    prompt=st.lists(st.integers(2, 299), min_size=1, max_size=90).map(tuple),
    temperature=st.sampled_from([0.0, 0.8]),
    seed=st.integers(0, 3),
    tokens=st.integers(1, 12),
    joins=st.integers(0, 15),
)


@pytest.fixture(scope="module")
def loaded(tiny_engine: Path) -> tuple[Engine, CpuBackend]:
    engine = store.load(tiny_engine)
    return engine, CpuBackend(engine, tiny_engine)


def _run(loaded: tuple[Engine, CpuBackend], jobs: list[Job], in_flight: int = 1) -> list[tuple[int, ...]]:
    engine, backend = loaded
    backend.steps_in_flight = in_flight
    executor = Executor(engine, backend, None)
    done: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    waiting = sorted(enumerate(jobs), key=lambda item: item[1].joins)
    step = 0
    while waiting or executor.busy:
        while waiting and waiting[0][1].joins <= step:
            index, job = waiting.pop(0)
            params = SamplingParams(
                temperature=job.temperature, seed=job.seed, max_tokens=job.tokens, top_k=40, top_p=0.95, ignore_eos=True
            )
            executor.submit(Submission(str(index), job.prompt, params, done.put))  # type: ignore[arg-type]
        executor.step()
        step += 1
    executor.kv.check()
    results = [done.get() for _ in jobs]
    return [r.outputs[0].token_ids for r in sorted(results, key=lambda r: int(r.request_id))]


@given(st.lists(JOBS, min_size=2, max_size=7))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tokens_are_those_of_each_request_alone(loaded: tuple[Engine, CpuBackend], jobs: list[Job]) -> None:
    together = _run(loaded, jobs)
    assert together == [_run(loaded, [job])[0] for job in jobs]


@given(st.lists(JOBS, min_size=2, max_size=6))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lagging_by_a_step_changes_nothing(loaded: tuple[Engine, CpuBackend], jobs: list[Job]) -> None:
    assert _run(loaded, jobs, in_flight=2) == _run(loaded, jobs, in_flight=1)
