"""Memory in use: the most while something ran, watched from a thread, and what an open model holds."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from penstock.bench.latency import run, settle
from penstock.bench.records import Maker, Record
from penstock.bench.subject import Subject, open_subject
from penstock.bench.workload import prompt
from penstock.compiler.progress import silent
from penstock.engine.manifest import Engine
from penstock.engine.memory import least_budget
from penstock.errors import ResourceError
from penstock.ir.lazy import torch
from penstock.runtime.open import RunLimits

INTERVAL = 0.1  # seconds
QUERY = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]

ROOM = 512  # tokens of the one request that the least pool is for, and of a step


def minimal(subject: Subject, engine: Engine, figure: Maker, say: Callable[[str], None]) -> Iterator[Record]:
    """What a run for one short request holds on the GPU, with no KV beyond its own: opened so, and measured.

    Nothing on a CPU.
    """
    if engine.device.kind != "cuda":
        return
    torch.empty(1, device="cuda")  # makes the context, which is not the engine's
    before, room = held_bytes("cuda"), min(ROOM, engine.profile.max_seq_len, engine.profile.max_num_tokens)
    budget = least_budget(engine, RunLimits(1, room, room).within(engine.profile))
    limits = {"max_batch_size": 1, "max_num_tokens": room, "max_seq_len": room, "max_gpu_bytes": budget}
    try:
        with open_subject(subject, silent, device="cuda", **limits) as opened:
            run(opened.llm, [prompt(room - 8, 0, opened.vocab)], 8)
            settle(opened.llm)
            held = held_bytes("cuda") - before
    except ResourceError as error:
        say(f"memory_gib is left out: {error}")
        return
    note = f"run limited to one request of {room} tokens and its KV; CUDA context excluded"
    yield figure("memory_gib", held / 2**30, "GiB", note=note)


class Peak:
    """`host`: bytes of this process beyond what it held before, mapped files apart; `device`: of the GPU in all."""

    def __init__(self, kind: str) -> None:
        self.host = self.device = 0
        self._gpu = kind == "cuda"
        self._before = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self.host = max(self.host, anonymous_bytes() - self._before)
            if self._gpu:
                self.device = max(self.device, _used())


def held_bytes(kind: str) -> int:
    """Bytes in use on the GPU by whoever uses it, or resident in this process on a CPU, mapped files included."""
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        return int(total - free)
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


def anonymous_bytes() -> int:
    """Bytes of this process that no file backs (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


def _used() -> int:
    return int(subprocess.run(QUERY, capture_output=True, text=True, check=True).stdout.split()[0]) << 20
