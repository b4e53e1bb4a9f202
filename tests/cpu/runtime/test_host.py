"""The host's part of a step, with a device that answers at once: who is woken, what is counted, what waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from penstock.engine import store
from penstock.runtime import loop as loop_module
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.loop import Gather, Loop, fresh_id, run_all
from penstock.runtime.requests import SamplingParams
from penstock.runtime.step import PLAIN_TAIL, Tail, Ticket
from penstock.runtime.upload import Numbers

QUIET = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)


class Instant:
    """Token 7 for everyone; two steps in flight. Waiting for a step takes so many seconds, spent as a driver does."""

    num_blocks = (64,)
    host_blocks = 0
    steps_in_flight = 2
    slow_steps = 0

    def __init__(self, delay: float = 0.0) -> None:
        self.launched = self.idled = 0
        self.delay = delay

    def launch(self, upload: Numbers, tokens: int, rows: int, logits: int, tail: Tail = PLAIN_TAIL) -> Ticket:
        self.launched += 1
        return Ticket(self.launched, logits)

    def read(self, ticket: Ticket) -> list[int]:
        end = time.thread_time() + self.delay
        while time.thread_time() < end:
            pass
        return [7] * ticket.logits

    def idle(self) -> bool:
        self.idled += 1
        return True

    def meanwhile(self) -> None: ...

    def counters(self) -> Mapping[str, int]:
        return {}

    def close(self) -> None: ...


def executor(engine: Path, backend: Instant | None = None) -> Executor:
    return Executor(store.load(engine), backend or Instant(), None)


def test_a_quiet_request_is_told_once_and_a_streaming_one_each_token(tiny_engine: Path) -> None:
    runs, told = executor(tiny_engine), {"quiet": [], "loud": []}
    for name, parts in told.items():
        runs.submit(Submission(name, (5, 6), QUIET, parts.append, streaming=name == "loud"))
    while runs.busy:
        runs.step()
    assert [len(told["quiet"]), len(told["loud"])] == [1, 8]
    quiet, loud = told["quiet"][0], told["loud"][-1]
    assert quiet.outputs == loud.outputs and quiet.outputs[0].token_ids == (7,) * 8
    assert [len(part.outputs[0].token_ids) for part in told["loud"]] == [*range(1, 9)]
    assert quiet.metrics.first_token < quiet.metrics.finished
    assert runs.scheduler.counters.generated_tokens == 16 and runs.stats.prompt_tokens == 4


def test_host_time_counts_the_threads_own_work_and_no_waiting(tiny_engine: Path) -> None:
    runs, before = executor(tiny_engine, Instant(delay=0.005)), time.thread_time()
    assert runs.stats.host_us_per_step == 0
    for _ in range(2):
        runs.submit(Submission(fresh_id(), (5, 6), QUIET, lambda _: None))
        while runs.busy:
            runs.step()
    spent, stats = time.thread_time() - before, runs.stats
    assert stats.host_steps == stats.steps == 16
    assert 0 < stats.host_seconds <= spent - 0.005 * stats.steps, "the device's time is no host time"
    assert stats.host_us_per_step == pytest.approx(1e6 * stats.host_seconds / 16)


def test_work_of_the_loop_itself_is_counted(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, plain = executor(tiny_engine), Executor._source

    def slow(self: Executor, request: Any) -> Any:
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass
        return plain(self, request)

    monkeypatch.setattr(Executor, "_source", slow)
    runs.submit(Submission("a", (5,), QUIET, lambda _: None))
    runs.step()
    assert runs.stats.host_seconds > 0.02


def test_a_batch_wakes_its_caller_once() -> None:
    gather, woken = Gather(2), threading.Event()

    class Output:
        def __init__(self, name: str) -> None:
            self.request_id = name

    def caller() -> None:
        gather.wait()
        woken.set()

    thread = threading.Thread(target=caller)
    thread.start()
    gather.put(Output("a"))  # type: ignore[arg-type]
    assert not woken.wait(0.05)
    gather.put(Output("b"))  # type: ignore[arg-type]
    assert woken.wait(5)
    thread.join()
    Gather(0).wait()


def test_a_command_does_not_wait_for_the_end_of_a_quiet_moment(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "QUIET", 30.0)
    backend = Instant()
    loop = Loop(lambda: executor(tiny_engine, backend))
    try:
        for _ in range(3):
            time.sleep(0.02)  # the loop waits, with idle work left
            start, gather = time.monotonic(), Gather(1)
            (output,) = run_all(loop, [Submission(fresh_id(), (5,), QUIET, gather.put)], gather)
            assert time.monotonic() - start < 1 and len(output.outputs[0].token_ids) == 8
        assert backend.idled == 0
    finally:
        loop.close()


def test_idle_work_is_done_when_nobody_comes(tiny_engine: Path) -> None:
    backend = Instant()
    loop = Loop(lambda: executor(tiny_engine, backend))
    end = time.monotonic() + 10
    while backend.idled < 3 and time.monotonic() < end:
        time.sleep(0.01)
    loop.close()
    assert backend.idled >= 3


def test_an_error_of_one_ends_the_batch_and_is_raised(tiny_engine: Path) -> None:
    loop = Loop(lambda: executor(tiny_engine))
    try:
        gather, ids = Gather(2), [fresh_id(), fresh_id()]
        loop.executor.backend.read = lambda ticket: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        with pytest.raises(Exception, match="division by zero"):
            run_all(loop, [Submission(each, (5,), QUIET, gather.put) for each in ids], gather)
        assert not loop.executor.busy
    finally:
        loop.close()
