"""The least time of steps, as the executor adds it up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, SamplingParams
from penstock.bench.roofs import decode_roof, first_token_roof
from penstock.engine import store
from penstock.engine.ideal import StepRoof
from penstock.engine.manifest import Engine
from penstock.kernels.roof import Roof


@pytest.fixture
def engine(tiny_engine: Path) -> Engine:
    return replace(store.load(tiny_engine), roof={"read_bytes_per_s": 1e9, "flops_per_s": 1e12})


@pytest.mark.parametrize("rate", [1e6, 1e9, 1e12])
def test_it_is_that_of_the_benchmarks(engine: Engine, rate: float) -> None:
    """Whether bytes or operations take longer."""
    roof = Roof(1e9, rate)
    step = StepRoof(replace(engine, roof={"read_bytes_per_s": 1e9, "flops_per_s": rate}))
    # The benchmark reads the KV of the context alone, a step that of its own tokens too.
    assert step.seconds(3, 3 * 49, [], 3) == pytest.approx(3 / decode_roof(engine, roof, 3, 50), rel=1e-2)
    assert step.seconds(0, 0, [(20, 0)], 1) == pytest.approx(first_token_roof(engine, roof, 20), rel=5e-2)


def test_it_counts_each_row_once(engine: Engine) -> None:
    work, roof = engine.work, StepRoof(engine)
    read = engine.step_bytes(5) + (10 + 2 + 7 + 3) * work["kv_bytes_per_token"]
    assert roof.seconds(2, 10, [(3, 7)], 3) == pytest.approx(read / 1e9)


def test_the_executor_adds_up_its_steps(tiny_engine: Path, engine: Engine) -> None:
    """Three prompts, some in chunks: what it says is the sum over the rows of the plans that it launched."""
    llm = LLM(tiny_engine)
    loop: Any = llm._loop
    executor = loop.executor
    expected, plans = StepRoof(engine), []
    schedule = executor.scheduler.schedule

    def noted() -> Any:
        plan = schedule()
        if plan is not None:
            plans.append([(row.num_tokens, row.start, row.samples) for row in plan.rows])
        return plan

    executor.scheduler.schedule, executor._roof = noted, StepRoof(engine)
    with llm:
        prompts = [{"prompt_token_ids": [*range(3, 3 + size)]} for size in (5, 40, 9)]
        llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0))
        stats = llm.stats()
    assert stats["roof_seconds"] == pytest.approx(sum(_least(rows, expected) for rows in plans))
    assert stats["device_seconds"] > 0
    assert len({len(rows) for rows in plans}) > 1, "decode rows and chunks were mixed"


def _least(rows: list[tuple[int, int, bool]], roof: StepRoof) -> float:
    singles = [start for tokens, start, samples in rows if tokens == 1 and samples]
    chunks = [(tokens, start) for tokens, start, samples in rows if not (tokens == 1 and samples)]
    return roof.seconds(len(singles), sum(singles), chunks, sum(samples for _, _, samples in rows))


def test_a_cpu_knows_no_roof(tiny_engine: Path) -> None:
    with LLM(tiny_engine) as llm:
        llm.generate("a", SamplingParams(max_tokens=2))
        assert llm.stats()["roof_seconds"] is None
