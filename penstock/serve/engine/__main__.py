"""`python -m penstock.serve.engine`."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from typing import TextIO

from penstock.errors import PenstockError
from penstock.serve.engine.process import Process
from penstock.serve.opening import read_opening


def main() -> None:
    opening = read_opening(sys.stdin.buffer.read())
    # Whoever started it decides when it ends. No-ops, not SIG_IGN, which the processes of a build would inherit.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    faults = _appending(opening.faults)
    faulthandler.enable(faults, all_threads=True)
    faulthandler.register(signal.SIGUSR1, faults, all_threads=True)
    try:
        Process(opening).run()
    except PenstockError:  # the other process has been told
        sys.exit(1)


def _appending(path: str) -> TextIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w")


if __name__ == "__main__":
    main()
