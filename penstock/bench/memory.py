"""The most memory that was in use while something ran, watched from a thread."""

from __future__ import annotations

import re
import subprocess
import threading
from pathlib import Path
from types import TracebackType

INTERVAL = 0.1  # seconds
QUERY = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]


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


def anonymous_bytes() -> int:
    """Bytes of this process that no file backs (Linux)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


def _used() -> int:
    return int(subprocess.run(QUERY, capture_output=True, text=True, check=True).stdout.split()[0]) << 20
