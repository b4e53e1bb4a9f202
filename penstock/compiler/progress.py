"""How long work shows itself. Imports nothing, so that what compiles nothing may use it."""

from __future__ import annotations

import threading
from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # stage, done, in all (0: not known)


def silent(stage: str, done: int, total: int) -> None:
    """Shows nothing."""


def serial(progress: Progress) -> Progress:
    """The same for stages that run side by side: one report at a time."""
    lock = threading.Lock()

    def report(stage: str, done: int, total: int) -> None:
        with lock:
            progress(stage, done, total)

    return report


def counting(stage: str, total: int, progress: Progress) -> Callable[[int], None]:
    """Adds up the bytes written, for the progress bar of a stage of `total` bytes."""
    done = 0

    def written(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return written
