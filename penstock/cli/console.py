"""Where words go: results to stdout, talk and progress to stderr; and how numbers read."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

PLAIN_EVERY = 10.0  # seconds between two lines about one stage where there is no terminal


def result(text: str, end: str = "\n") -> None:
    """Text that the caller asked for, at once."""
    try:
        print(text, end=end, flush=True)
    except UnicodeEncodeError:  # a path that is not UTF-8, or a terminal that cannot show a character
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)


def result_json(data: Any) -> None:
    result(json.dumps(data, indent=2, ensure_ascii=False))


def say(text: str) -> None:
    """Talk: goes to stderr, so that a pipe gets results alone."""
    print(text, file=sys.stderr, flush=True)


def formats(data: Mapping[str, Any]) -> str:
    """What is computed in, and what KV is kept in where that is another."""
    kept = data["kv_format"]
    return str(data["format"]) if kept == data["format"] else f"{data['format']}, KV {kept}"


def amount(value: float, unit: str = "B") -> str:
    """1536 -> 1.54 kB: three digits, powers of a thousand."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or prefix == "T":
            return f"{value:.3g} {prefix}{unit}" if abs(value) < 1000 else f"{value:.0f} {prefix}{unit}"
        value /= 1000
    raise AssertionError


def counted(count: int, noun: str) -> str:
    """1 text, 2 texts."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float) -> str:
    """0.00123 -> 1.23 ms."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def table(rows: Sequence[tuple[str, ...]], indent: str = "  ") -> str:
    """Rows with their columns aligned; columns of numbers to the right are the caller's to format."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows)
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


@dataclass
class Stage:
    """One stage as it was reported."""

    started: float
    done: int = 0
    total: int = 0
    latest: float = 0.0  # when it last reported
    shown: float = 0.0  # when it was last written about
    over: bool = False
    task: Any = None

    @property
    def seconds(self) -> float:
        return self.latest - self.started


@dataclass
class Progress:
    """Shows stages as they report themselves, and keeps their times. A context manager; call it (stage, done, total).

    On a terminal a bar for each stage, elsewhere a line when a stage ends and now and then while it runs; a name of
    several words is a sentence, said at once.
    """

    clock: Callable[[], float] = time.perf_counter
    stages: dict[str, Stage] = field(default_factory=dict)
    _bars: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bars = _bars()
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        now = self.clock()
        known = name in self.stages
        stage = self.stages.setdefault(name, Stage(now, shown=now))
        stage.latest = now
        whole = (done, total) == (1, 1)  # the stage is over; a count of its own stays as it is
        if not (whole and stage.total > 1):
            stage.done, stage.total = done, total
        stage.over = whole
        if self._bars is not None:
            self._bar(name, stage)
        else:
            self._line(name, stage, known)

    def _line(self, name: str, stage: Stage, known: bool) -> None:
        if stage.over:
            say(f"{name}: {stage.seconds:.2f} s" if known else name)
        elif not known and " " in name:
            say(name)
        elif stage.latest - stage.shown > PLAIN_EVERY:
            stage.shown = stage.latest
            say(f"{name}: {stage.done}{f' of {stage.total}' if stage.total else ''} after {stage.seconds:.0f} s")

    def _bar(self, name: str, stage: Stage) -> None:
        if stage.task is None:
            stage.task = self._bars.add_task(name, total=None, count="")
        count = f"{stage.done}" if not stage.total else f"{100 * stage.done // stage.total} %"
        total = stage.total or None
        self._bars.update(stage.task, completed=stage.done, total=total, count=count if stage.done else "")

    def seconds(self) -> dict[str, float]:
        """By stage, of those that ended."""
        return {name: stage.seconds for name, stage in self.stages.items() if stage.over}


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeElapsedColumn())
    return Bars(*columns, console=Console(stderr=True))
