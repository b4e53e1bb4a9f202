"""One JSON line a figure, with the environment it was measured in."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from penstock.engine.device import Device
from penstock.kernels.device import software


@dataclass(frozen=True)
class Record:
    """A figure. `share_of_roof`: 0 to 1, against the roof measured in the same run; None where none applies."""

    metric: str
    value: float
    unit: str
    model: str
    format: str
    share_of_roof: float | None = None
    spread: float | None = None
    note: str = ""
    commit: str = ""
    when: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)


def environment(device: Device) -> dict[str, Any]:
    """GPU, driver, versions and CPU of this machine."""
    import torch

    facts: dict[str, Any] = {
        "device": device.name,
        **software(device),
        "python": platform.python_version(),
        "cpu": _cpu(),
    }
    if device.kind == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {"cuda": torch.version.cuda, "driver": _output(query)}
    return facts


def commit() -> str:
    """The commit that is checked out, with "+" where the tree differs from it; empty outside a checkout."""
    head = _output(["git", "rev-parse", "--short", "HEAD"])
    return head + ("+" if head and _output(["git", "status", "--porcelain", "--untracked-files=no"]) else "")


def append(path: Path, records: list[Record]) -> None:
    """Write records at the end of a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(asdict(record)) + "\n")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _cpu() -> str:
    names = [
        x.split(":", 1)[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
