"""The scheduler's machine with thirty times the examples of the quick run, each longer, drawn anew each time."""

from __future__ import annotations

import time

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.long import results
from tests.null.schedule.test_scheduler_machine import SchedulerMachine

pytestmark = pytest.mark.long
EXAMPLES, STEPS = 5_000, 60


@pytest.mark.timeout(3600)
def test_the_scheduler_machine_at_length() -> None:
    start = time.perf_counter()
    tried: list[int] = []

    class Counted(SchedulerMachine):
        def teardown(self) -> None:
            super().teardown()
            tried.append(1)

    run_state_machine_as_test(
        Counted,
        settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None, derandomize=False),
    )
    results.write("scheduler", examples=len(tried), steps=STEPS, seconds=time.perf_counter() - start)
    assert len(tried) >= EXAMPLES
