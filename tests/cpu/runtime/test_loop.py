"""The loop's borders: one bad request ends itself alone, and nobody ever waits for an answer that cannot come."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import EngineMismatch, ExecutorError, OptionError, PromptError
from penstock.runtime import open as open_module
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.loop import Gather, Loop, fresh_id, run_all
from penstock.runtime.open import RunLimits, open_loop
from penstock.runtime.requests import SamplingParams
from penstock.runtime.step import CpuBackend

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def loop(tiny_engine: Path) -> Iterator[Loop]:
    opened = open_loop(tiny_engine)
    yield opened
    opened.close()


def ask(loop: Loop, *prompts: tuple[int, ...]) -> list[tuple[int, ...]]:
    gather = Gather(len(prompts))
    new = [Submission(fresh_id(), p, GREEDY, gather.put) for p in prompts]
    return [output.outputs[0].token_ids for output in run_all(loop, new, gather)]


@pytest.mark.parametrize("ids", [(1.5,), ("a",), (None,), (True,), ([1],)])
def test_a_malformed_prompt_is_refused_and_leaves_nothing(loop: Loop, ids: Any) -> None:
    with pytest.raises(PromptError, match="position 0"):
        ask(loop, (5,), ids)
    assert not loop.executor.busy
    assert len(ask(loop, (5,))[0]) == 8


def test_a_sink_that_raises_ends_its_own_request_alone(loop: Loop) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("the caller has gone")

    loop.submit(Submission(fresh_id(), (7,), GREEDY, broken, streaming=True))
    assert len(ask(loop, (5,), (6,))) == 2
    loop.call(loop.executor.kv.check)
    assert loop.call(lambda: loop.executor.kv.usage) == 0


def test_a_loop_that_dies_answers_everyone(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = open_loop(tiny_engine)
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    started = threading.Event()

    def dies(self: Executor) -> bool:
        started.set()
        raise MemoryError("no more")

    monkeypatch.setattr(Executor, "step", dies)
    with pytest.raises(ExecutorError, match="no more"):
        for _ in range(100):  # the first may be taken before the loop dies, none after
            loop.submit(Submission(fresh_id(), (5,), GREEDY, done.put))
    assert started.is_set()
    with pytest.raises(ExecutorError, match="open the engine again"):
        loop.call(lambda: None)
    loop.close()


def test_what_opening_raises_is_raised_to_the_opener(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise MemoryError("not enough")

    monkeypatch.setattr(open_module, "CpuBackend", full)
    with pytest.raises(MemoryError, match="not enough"):
        open_loop(tiny_engine)


def test_running_requests_end_with_an_error_when_the_engine_closes(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = open_loop(tiny_engine)
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    gate, plain = threading.Event(), CpuBackend.launch

    def slow(self: CpuBackend, *rest: Any) -> Any:
        gate.set()
        return plain(self, *rest)

    monkeypatch.setattr(CpuBackend, "launch", slow)
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    loop.submit(Submission(fresh_id(), (5,), params, done.put))
    gate.wait(10)
    loop.close()
    result = done.get(timeout=10)
    assert isinstance(result, ExecutorError) or result.finished
    with pytest.raises(ExecutorError, match="shut down"):
        loop.submit(Submission(fresh_id(), (5,), params, done.put))
    loop.abort("request-0")


def test_limits_below_the_profile_are_kept_and_above_are_refused(tiny_engine: Path) -> None:
    loop = open_loop(tiny_engine, limits=RunLimits(max_batch_size=1, max_seq_len=20))
    assert len(ask(loop, (5,), (6,), (7,))) == 3
    with pytest.raises(PromptError, match="the limit is 19"):
        ask(loop, (5,) * 20)
    loop.close()
    with pytest.raises(OptionError, match="max_seq_len=999 exceeds the 256 that the engine was built for"):
        open_loop(tiny_engine, limits=RunLimits(max_seq_len=999))


def test_another_torch_is_a_mismatch(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_module, "software", lambda _: {"penstock": "0.1.0", "torch": "9.9"})
    with pytest.raises(EngineMismatch, match=r"torch .* 9\.9; run `penstock build` here"):
        open_loop(tiny_engine)


def test_leaving_the_process_while_a_request_runs_is_clean(tiny_engine: Path) -> None:
    program = f"""
from pathlib import Path
from penstock.runtime.open import open_loop
from penstock.runtime.intake import Submission
from penstock.runtime.requests import SamplingParams
loop = open_loop(Path({str(tiny_engine)!r}))
loop.submit(Submission("a", (5,), SamplingParams(temperature=0, max_tokens=250, ignore_eos=True), lambda _: None))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
