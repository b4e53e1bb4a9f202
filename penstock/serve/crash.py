"""What is left of an engine process that died: one JSON file, without prompts or texts."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from penstock import __version__
from penstock.engine.place import cache_root

KEPT: Final = 20  # reports in a directory; the oldest go


@dataclass(frozen=True)
class Crash:
    """reason: what ended it, in words. code: of its exit; signal: that killed it. uptime: seconds from its start.
    steps: the newest launched and the one before, as `blackbox` kept them. stacks: of all its threads, as far as they
    could be written. stats: the newest beat's, `beat_age` seconds old."""

    reason: str
    code: int | None
    signal: str | None
    uptime: float
    pid: int
    requests_open: int
    facts: Mapping[str, Any]
    stats: Mapping[str, Any]
    beat_age: float | None
    steps: list[dict[str, Any]]
    stacks: str
    stderr: str
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    version: str = __version__


def signal_of(returncode: int | None) -> str | None:
    """The name of the signal that ended a process."""
    if returncode is None or returncode >= 0:
        return None
    with suppress(ValueError):
        return signal.Signals(-returncode).name
    return f"signal {-returncode}"


def crash_dir(chosen: Path | None = None) -> Path:
    return chosen or cache_root() / "crashes"


def write(crash: Crash, directory: Path) -> Path:
    """Its file, whole or not at all, for its owner alone. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / f"crash-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{crash.pid}.json"
    part = path.with_suffix(".part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(crash), file, indent=1, default=str)
    part.replace(path)
    for old in sorted(directory.glob("crash-*.json"))[:-KEPT]:
        old.unlink(missing_ok=True)
    return path
