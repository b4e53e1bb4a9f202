"""Worker processes: a pool that compiles kernels side by side, and one that times plans on the GPU."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penstock.compiler.timing import Timing
from penstock.engine.device import Device
from penstock.engine.program import Plan, Site, Sizes, plan_to_json, site_to_json
from penstock.kernels.tactic import TritonKernel

PATIENCE = 120.0  # seconds for one job; a kernel that hangs is a tactic less, not a build that hangs


class Worker:
    """One process, started on first use and again after it died."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[str] | None = None

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer, or a refusal that says how the process ended."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline() if _ready(process.stdout) else ""
        except BrokenPipeError:
            line = ""
        if line:
            answer = dict(json.loads(line))
            if "CUDA error" in str(answer.get("refused", "")):
                self.close()  # its context is lost; the next job gets a fresh process
            return answer
        self.close()
        return {"refused": f"the worker process died or hung (exit status {process.returncode})"}

    def close(self) -> None:
        if self._process is not None:
            with self._process as process:  # closes the pipes and waits
                process.kill()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "penstock.compiler.worker", str(self.folder)]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(command, text=True, **pipes)
        return self._process


def _ready(stream: Any) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(PATIENCE))


class Workshop:
    """Compiles kernels in parallel and times plans in one process; use as a context manager."""

    def __init__(self, folder: Path, device: Device) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device = folder, device
        count = max(1, min(14, (os.cpu_count() or 2) - 1))
        self._compilers = [Worker(folder) for _ in range(count)]
        self._timer = Worker(folder)

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self._compilers, self._timer):
            worker.close()

    def compile(self, kernels: Iterable[TritonKernel], progress: Callable[[], None]) -> dict[str, str]:
        """Compile what is not in the folder yet. Returns the refusals by kernel key."""
        capability = self.device.capability
        wanted = {k.key(capability): k for k in kernels}
        missing = {key: k for key, k in wanted.items() if not (self.folder / f"{key}.json").exists()}
        free = list(self._compilers)

        def one(item: tuple[str, TritonKernel]) -> tuple[str, str]:
            worker = free.pop()
            answer = worker.ask({"do": "compile", "kernel": asdict(item[1]), "capability": capability})
            free.append(worker)
            progress()
            return item[0], str(answer.get("refused", ""))

        with ThreadPoolExecutor(len(self._compilers)) as threads:
            return {key: refused for key, refused in threads.map(one, missing.items()) if refused}

    def time(self, site: Site, sizes: Sizes, plan: Plan) -> Timing:
        """Gate and time a plan on the GPU."""
        job = {"do": "time", "site": site_to_json(site), "sizes": dict(sizes), "plan": plan_to_json(plan)}
        return Timing(**self._timer.ask({**job, "device": asdict(self.device)}))

    def roof(self, format: str) -> dict[str, float]:
        """The GPU's own rates, measured where tactics are timed; empty where that failed."""
        answer = self._timer.ask({"do": "roof", "device": asdict(self.device), "format": format})
        return {} if "refused" in answer else answer
