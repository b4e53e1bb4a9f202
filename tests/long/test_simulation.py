"""A million steps of the scheduler under load, within a minute of one core."""

from __future__ import annotations

import time

import pytest

from tests.long import results
from tests.long.simulator import simulate

pytestmark = pytest.mark.long
SEED, SIMULATIONS, STEPS = 1, 200, 5_000  # of each, with arrivals
LIMIT = 60.0  # seconds of CPU time


@pytest.mark.timeout(1200)
def test_a_million_steps() -> None:
    start, cpu = time.perf_counter(), time.process_time()
    found = simulate(SEED, SIMULATIONS, STEPS)
    cpu = time.process_time() - cpu
    results.write(
        "simulation", seed=SEED, simulations=SIMULATIONS, **found.facts(), cpu_seconds=cpu,
        seconds=time.perf_counter() - start,
    )  # fmt: skip
    assert found.steps >= SIMULATIONS * STEPS and cpu <= LIMIT
    assert min(found.refused, found.preemptions, found.reused_tokens, found.evicted, found.failed_steps) > 0
    assert set(found.ends) == {"length", "stop", "abort", "error"}
