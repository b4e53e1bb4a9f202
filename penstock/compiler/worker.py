"""A worker process: compiles kernels and times plans, one JSON line in, one out. A crash here costs one tactic.

Jobs are numbered, and an answer has its job's number. Run as `python -m penstock.compiler.worker FOLDER [KNOWN]`;
FOLDER holds compiled kernels, KNOWN is JSON: the plugins of the process that asks, and its search path.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from penstock import plugins
from penstock.compiler.timing import CudaTimer, Timing
from penstock.engine.device import Device
from penstock.engine.program import plan_from_json, site_from_json
from penstock.errors import PenstockError
from penstock.kernels.compile import compile_kernel, load_compiler, store, stored
from penstock.kernels.driver import Kernel, load
from penstock.kernels.roof import measure
from penstock.kernels.tactic import kernel_from_json

Job = Mapping[str, Any]
COMPILER_NICE = 10


def compile_job(folder: Path, job: Job) -> dict[str, Any]:
    """Compile one kernel into the folder unless it is there already."""
    kernel, capability = kernel_from_json(job["kernel"]), int(job["capability"])
    key = kernel.key(capability)
    if stored(folder, key) is None:
        store(compile_kernel(kernel, capability), folder, key)
    return {"key": key}


@lru_cache(maxsize=512)
def _kernel(folder: Path, key: str) -> Kernel:
    binary = stored(folder, key)
    if binary is None:
        raise PenstockError(f"kernel {key} was not compiled")
    return load(binary.cubin, binary.facts())


@lru_cache(maxsize=1)
def _timer(folder: Path, device: Device) -> CudaTimer:
    return CudaTimer(device, lambda key: _kernel(folder, key))


def time_job(folder: Path, job: Job) -> dict[str, Any]:
    """Gate and time one plan on this machine's GPU."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        timer = _timer(folder, Device(**job["device"]))
        best = float(job.get("best_us", math.inf))
        layouts = tuple((index, name) for index, name in job.get("layouts", ()))
        return asdict(timer(site_from_json(job["site"]), job["sizes"], plan_from_json(job["plan"]), best, layouts))


def load_compiler_job(folder: Path, job: Job) -> dict[str, Any]:
    """Import what compiles, and make way: what times must not wait for a processor."""
    os.nice(COMPILER_NICE)
    load_compiler()
    return {}


def load_timer_job(folder: Path, job: Job) -> dict[str, Any]:
    """Import torch and start the device."""
    _timer(folder, Device(**job["device"]))
    return {}


def roof_job(folder: Path, job: Job) -> dict[str, Any]:
    """The rates of this machine's GPU."""
    return asdict(measure(Device(**job["device"]), job["format"]))


JOBS: Mapping[str, Callable[[Path, Job], dict[str, Any]]] = {
    "load_compiler": load_compiler_job, "load_timer": load_timer_job,
    "compile": compile_job, "time": time_job, "roof": roof_job,
}  # fmt: skip


def main() -> None:
    """Answer jobs until the input ends."""
    folder, known = Path(sys.argv[1]), json.loads(sys.argv[2]) if sys.argv[2:] else {"plugins": [], "path": []}
    sys.path += [place for place in known["path"] if place not in sys.path]
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print must not mix with the answers
    for line in sys.stdin:
        job = json.loads(line)
        try:
            plugins.load_named(known["plugins"])
            answer = JOBS[job["do"]](folder, job)
        except Exception as error:  # a process boundary: the parent re-reports it as the tactic's refusal
            answer = asdict(Timing(refused=f"{type(error).__name__}: {str(error)[:300]}"))
        print(json.dumps({**answer, "job": job["job"]}), file=answers, flush=True)


if __name__ == "__main__":
    main()
