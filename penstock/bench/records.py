"""One JSON line a figure, with the environment it was measured in."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from penstock.engine.device import Device
from penstock.kernels.device import software

TREE = Path(__file__).resolve().parents[2]  # what holds the package


@dataclass(frozen=True)
class Record:
    """A figure. `share_of_roof`: 0 to 1, against the roof measured in the same run; None where none applies.

    `engine`: whose figure it is, with its version, where it is not ours.
    """

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
    engine: str = ""


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes the records of one model in one format."""

    model: str
    format: str

    def __call__(
        self, metric: str, value: float, unit: str, share_of_roof: float | None = None, spread: float | None = None,
        note: str = "", engine: str = "",
    ) -> Record:  # fmt: skip
        return Record(metric, value, unit, self.model, self.format, share_of_roof, spread, note, engine=engine)


def environment(device: Device) -> dict[str, Any]:
    """GPU, driver, versions and CPU of this machine."""
    import torch

    facts: dict[str, Any] = {
        "device": device.name,
        **software(device),
        "python": platform.python_version(),
        "cpu": cpu(),
    }
    if device.kind == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {"cuda": torch.version.cuda, "driver": _output(query)}
    return facts


def commit() -> str:
    """Of Penstock's own tree, wherever the process stands: the commit that is checked out, with "+" where the tree
    differs from it; empty where the package lies in no checkout of its own."""
    git = ["git", "-C", str(TREE)]
    if _output([*git, "rev-parse", "--show-toplevel"]) != str(TREE):  # installed into another project's tree
        return ""
    head = _output([*git, "rev-parse", "--short", "HEAD"])
    return head + ("+" if head and _output([*git, "status", "--porcelain", "--untracked-files=no"]) else "")


def stamper(device: Device, of_commit: str | None = None) -> Callable[[Record], Record]:
    """Puts the commit, the time and the environment into records; all are looked up once, now."""
    head = commit() if of_commit is None else of_commit
    facts = {"commit": head, "when": now(), "environment": environment(device)}
    return lambda record: replace(record, **facts)  # type: ignore[arg-type]  # each fact is of its field's type


def line(record: Record) -> str:
    """A record as a line of text."""
    share = "" if record.share_of_roof is None else f"  {record.share_of_roof:.1%} of the roof"
    return f"{record.metric:28} {record.value:12.2f} {record.unit}{share} {record.note}".rstrip()


def append(path: Path, records: Sequence[Record]) -> None:
    """Write records at the end of a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(asdict(record)) + "\n")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def cpu() -> str:
    """How many of what this machine has."""
    names = [
        x.split(":", 1)[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
