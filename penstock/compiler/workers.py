"""Worker processes: a pool that compiles kernels side by side, and one that times plans on the GPU."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penstock import plugins
from penstock.compiler.timing import Layouts, Timing
from penstock.engine.device import Device
from penstock.engine.program import Plan, Site, Sizes, plan_to_json, site_to_json
from penstock.kernels.tactic import Kernel

PATIENCE = 120.0  # seconds for one job; a kernel that hangs is a tactic less, not a build that hangs
SPARE = 3  # processors left to the process that times and to the one that builds
UNANSWERED = "the worker process answered without"
Job = dict[str, Any]


class Worker:
    """One process, started again after it died. `first`: its first job, which loads what the later ones work with.

    Jobs are numbered, and so are their answers: one that comes late is nobody's.
    """

    def __init__(self, folder: Path, first: Job) -> None:
        self.folder, self.first = folder, first
        self._process: subprocess.Popen[str] | None = None
        self._loading = False  # the first job's answer has not been read
        self._number = 0  # of the last job sent

    def start(self) -> None:
        """Start the process and its first job, and do not wait for either."""
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(_command(self.folder), text=True, **pipes)
        self._loading = True
        with contextlib.suppress(BrokenPipeError):  # it died at once: the next job finds out, and says so
            self._send(self._process, self.first)

    def ask(self, job: Job) -> Job:
        """The answer, or a refusal that says how the process ended."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self.start()
        process = self._process
        assert process is not None
        answer = self._exchange(process, job)
        if answer is None:
            self.close()
            return {"refused": f"the worker process died or hung (exit status {process.returncode})"}
        if "CUDA error" in str(answer.get("refused", "")):
            self.close()  # its context is lost; the next job gets a fresh process
        return answer

    def close(self) -> None:
        if self._process is not None:
            with self._process as process:  # closes the pipes and waits
                process.kill()
            self._process = None

    def _exchange(self, process: subprocess.Popen[str], job: Job) -> Job | None:
        """The job's answer; None where the process ended, hangs, or answers something else."""
        try:
            if self._loading:  # before the next is sent: with two answers on their way, one could hide in a buffer
                if self._answer(process) is None:
                    return None
                self._loading = False
            self._send(process, job)
            return self._answer(process)
        except BrokenPipeError:
            return None

    def _answer(self, process: subprocess.Popen[str]) -> Job | None:
        """The answer to the job sent last."""
        try:
            answer = dict(json.loads(_line(process)))
        except ValueError:  # nothing came, or no answer of ours
            return None
        return answer if answer.pop("job", None) == self._number else None

    def _send(self, process: subprocess.Popen[str], job: Job) -> None:
        assert process.stdin is not None
        self._number += 1
        process.stdin.write(json.dumps({**job, "job": self._number}) + "\n")
        process.stdin.flush()


def _command(folder: Path) -> list[str]:
    """With plugins, also these and where to find modules: what the process knows of both is this one's."""
    modules = plugins.shared()
    extra = [json.dumps({"plugins": modules, "path": sys.path})] if modules else []
    return [sys.executable, "-m", "penstock.compiler.worker", str(folder), *extra]


def _line(process: subprocess.Popen[str]) -> str:
    """The next answer; empty where the process ended or hangs."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(PATIENCE) else ""


class Workshop:
    """Compiles kernels in parallel, and times plans in one process meanwhile; a context manager.

    All processes start on entering, each loading what it will need. `gpu` is held while a plan is timed: whoever else
    wants the device takes it first. `seconds`: how long plans were timed in all, and kernels compiled, by the clock.
    """

    def __init__(self, folder: Path, device: Device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device = folder, device
        count = max(1, min(14, (os.cpu_count() or 2) - SPARE))
        self._compilers = [Worker(folder, {"do": "load_compiler"}) for _ in range(count)]
        self._timer = Worker(folder, {"do": "load_timer", "device": asdict(device)})
        self._free = list(self._compilers)
        self._threads = ThreadPoolExecutor(count)
        self._compiled: dict[str, Future[str]] = {}
        self._clock = _Clock()
        self.gpu = threading.Lock()
        self._timed = 0.0

    def __enter__(self) -> Workshop:
        for worker in (self._timer, *self._compilers):
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for worker in (*self._compilers, self._timer):
            worker.close()

    @property
    def seconds(self) -> Mapping[str, float]:
        return {"compile": round(self._clock.seconds, 3), "time": round(self._timed, 3)}

    def submit(self, kernels: Iterable[Kernel], progress: Callable[[], None] = lambda: None) -> None:
        """Start compiling what is not in the folder and has not been started; the first to come is the first done."""
        for kernel in kernels:
            key = kernel.key(self.device.capability)
            if key not in self._compiled:
                there = (self.folder / f"{key}.json").exists()
                self._compiled[key] = _done() if there else self._threads.submit(self._compile, kernel, progress)

    def refusals(self, keys: Iterable[str]) -> dict[str, str]:
        """Wait for kernels that were started. Why those of them that did not compile did not, by key."""
        found = {key: self._compiled[key].result() for key in keys}
        return {key: refused for key, refused in found.items() if refused}

    def compile(self, kernels: Iterable[Kernel], progress: Callable[[], None] = lambda: None) -> dict[str, str]:
        """Start these, and wait for them. Returns the refusals by kernel key."""
        wanted = list(kernels)
        self.submit(wanted, progress)
        return self.refusals(kernel.key(self.device.capability) for kernel in wanted)

    def time(self, site: Site, sizes: Sizes, plan: Plan, best_us: float = math.inf, layouts: Layouts = ()) -> Timing:
        """Gate and time a plan on the GPU. `best_us`: of those timed before for the same site and sizes. `layouts`: of
        the weights that are not plain."""
        job = {"do": "time", "site": site_to_json(site), "sizes": dict(sizes), "plan": plan_to_json(plan)}
        best = {} if math.isinf(best_us) else {"best_us": best_us}  # JSON has no infinity
        return _timing(self._on_gpu({**job, **best, "layouts": layouts}))

    def roof(self, format: str) -> dict[str, float]:
        """The GPU's own rates, measured where tactics are timed; empty where that failed."""
        answer = self._on_gpu({"do": "roof", "format": format})
        return {} if "refused" in answer else answer

    def _on_gpu(self, job: Job) -> Job:
        with self.gpu:
            start = time.perf_counter()
            answer = self._timer.ask({**job, "device": asdict(self.device)})
            self._timed += time.perf_counter() - start
        return answer

    def _compile(self, kernel: Kernel, progress: Callable[[], None]) -> str:
        worker = self._free.pop()
        with self._clock:
            answer = worker.ask({"do": "compile", "kernel": asdict(kernel), "capability": self.device.capability})
        self._free.append(worker)
        progress()
        return "" if "key" in answer else str(answer.get("refused") or f"{UNANSWERED} a compiled kernel")


def _timing(answer: Job) -> Timing:
    """What was answered; an answer without a time is a refusal, not a plan that takes none."""
    if not answer.get("refused") and not float(answer.get("median_us", 0.0)) > 0:
        return Timing(refused=f"{UNANSWERED} a time")
    return Timing(**answer)


def _done() -> Future[str]:
    """What is compiled already, without a refusal."""
    future: Future[str] = Future()
    future.set_result("")
    return future


class _Clock:
    """Seconds during which at least one thread was inside."""

    def __init__(self) -> None:
        self._lock, self._inside, self._since, self.seconds = threading.Lock(), 0, 0.0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._since = self._since if self._inside else time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.seconds += time.perf_counter() - self._since
