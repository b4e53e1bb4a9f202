"""Worker processes: whoever asks gets the answer to what was asked, and what dies or hangs is a refusal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from penstock.compiler import workers
from penstock.compiler.timing import Timing
from penstock.compiler.workers import Worker, Workshop
from penstock.engine.device import CPU, H200
from penstock.engine.program import Plan, Site
from penstock.kernels.tactic import TritonKernel

FIRST = {"do": "load_timer", "device": asdict(H200)}  # ends with a refusal where there is no GPU


def test_the_first_jobs_answer_is_nobodys(tmp_path: Path) -> None:
    with closing(Worker(tmp_path, FIRST)) as worker:
        worker.start()
        for job in ("first", "second"):
            assert worker.ask({"do": job}) == {"median_us": 0.0, "spread_us": 0.0, "refused": f"KeyError: '{job}'"}


def test_a_process_that_died_is_replaced(tmp_path: Path) -> None:
    with closing(Worker(tmp_path, FIRST)) as worker:
        assert "KeyError" in worker.ask({"do": "one"})["refused"]
        assert worker._process is not None
        worker._process.kill()
        worker._process.wait()
        assert "KeyError" in worker.ask({"do": "two"})["refused"]


def test_a_process_that_hangs_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 0.0)
    with closing(Worker(tmp_path, FIRST)) as worker:
        assert "died or hung" in worker.ask({"do": "one"})["refused"]
        assert worker._process is None


ANSWERS = """
import json, sys, time
for line in sys.stdin:
    job = json.loads(line)
    time.sleep(job.get("sleep", 0))
    print(json.dumps({"job": job.get("as", job["job"]), "said": job.get("say")}), flush=True)
"""


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker that answers what it is told to say, as late and under the number that it is told to."""
    monkeypatch.setattr(workers, "_command", lambda _: [sys.executable, "-c", ANSWERS])
    with closing(Worker(tmp_path, {})) as worker:
        yield worker


def test_an_answer_that_comes_too_late_is_nobodys(answering: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it to the first job or to a later one: whoever asks next gets his own."""
    monkeypatch.setattr(workers, "PATIENCE", 1.0)
    answering.first = {"sleep": 1.5}
    assert "died or hung" in answering.ask({"say": "one"})["refused"]
    answering.first = {}
    assert answering.ask({"say": "two"}) == {"said": "two"}
    assert "died or hung" in answering.ask({"say": "three", "sleep": 1.5})["refused"]
    assert answering.ask({"say": "four"}) == {"said": "four"}


def test_an_answer_to_another_job_is_a_refusal(answering: Worker) -> None:
    assert "died or hung" in answering.ask({"say": "one", "as": 1})["refused"]
    assert answering.ask({"say": "two"}) == {"said": "two"}


@pytest.mark.parametrize("answer", [{}, {"median_us": 0.0, "spread_us": 0.0, "refused": ""}])
def test_an_answer_without_a_time_is_a_refusal(answer: dict[str, Any], shop: Workshop) -> None:
    """0 us would be the fastest of all."""
    site, made = Site("add", (), (), (), ()), Plan("tactic", ())
    shop._timer.ask = lambda job: answer  # type: ignore[method-assign]
    assert "without a time" in shop.time(site, {}, made).refused
    shop._timer.ask = lambda job: {"median_us": 2.0, "spread_us": 0.5, "refused": ""}  # type: ignore[method-assign]
    assert shop.time(site, {}, made) == Timing(2.0, 0.5)


def test_an_answer_without_a_kernel_is_a_refusal(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slow, "ask", lambda self, job: {})
    assert "without a compiled kernel" in shop.compile([kernel(5)])[kernel(5).key(0)]


class Slow:
    """In place of a compiling process."""

    running = most = 0

    def __init__(self, folder: Path, first: dict[str, Any]) -> None:
        self.folder = folder

    def start(self) -> None: ...

    def close(self) -> None: ...

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        Slow.running += 1
        Slow.most = max(Slow.most, Slow.running)
        time.sleep(0.05)
        Slow.running -= 1
        return {"refused": "it is too large"} if job["kernel"]["num_warps"] == 32 else {"key": "a"}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    monkeypatch.setattr(workers, "Worker", Slow)
    monkeypatch.setattr(os, "cpu_count", lambda: workers.SPARE + 4)
    with Workshop(tmp_path, CPU) as made:
        yield made


def kernel(number: int, warps: int = 4) -> TritonKernel:
    return TritonKernel("penstock.kernels.add.elementwise_triton:add", (), (("NUMBER", number),), warps)


def test_kernels_compile_in_the_background_and_side_by_side(shop: Workshop) -> None:
    start, done = time.perf_counter(), threading.Event()
    shop.submit([kernel(i) for i in range(8)], done.set)
    assert time.perf_counter() - start < 0.05 and not done.is_set()
    assert shop.refusals(kernel(i).key(0) for i in range(8)) == {}
    assert done.is_set() and Slow.most == 4
    assert 0.09 < shop.seconds["compile"] < 0.4, "by the clock, not added up"


def test_a_kernel_is_compiled_once_and_its_refusal_kept(shop: Workshop) -> None:
    count: list[int] = []
    for _ in range(2):
        shop.submit([kernel(1), kernel(2, 32)], lambda: count.append(1))
        assert shop.compile([kernel(1), kernel(2, 32)]) == {kernel(2, 32).key(0): "it is too large"}
    assert len(count) == 2


def test_what_lies_in_the_folder_is_not_compiled(shop: Workshop) -> None:
    (shop.folder / f"{kernel(3).key(0)}.json").write_text("{}")
    assert shop.compile([kernel(3)], lambda: pytest.fail("compiled")) == {}
