"""What the verbs of `penstock bench` do: open, measure, close, and tell as text, as data and as records."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penstock.bench import against, plot, scaling
from penstock.bench.claims import claims
from penstock.bench.figures import Effort, Figures, measured_roof
from penstock.bench.latency import settle
from penstock.bench.memory import held_bytes
from penstock.bench.records import Record, line, stamper
from penstock.bench.report import columns, report
from penstock.bench.start import start_times
from penstock.bench.subject import Opened, Subject, find, open_subject
from penstock.bench.workload import MODELS
from penstock.compiler.progress import Progress
from penstock.engine import store
from penstock.engine.device import Device
from penstock.errors import OptionError
from penstock.ir.lazy import torch
from penstock.kernels.device import detect
from penstock.models.directory import ModelDirectory
from penstock.models.hub import resolve

Say = Callable[[str], None]
Shown = AbstractContextManager[Progress]


@dataclass(frozen=True, slots=True)
class Extras:
    """What is measured beside the report."""

    prefill: bool = False
    throughput: bool = False
    start: bool = False
    against: str | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class Told:
    """The same thrice."""

    text: str
    data: dict[str, Any]
    records: list[Record]


def latency_report(
    model: str | None, weights: str, effort: Effort, extras: Extras, shown: Shown, say: Say,
    arguments: Mapping[str, Any],
) -> Told:  # fmt: skip
    """The classic report. Raises OptionError before any work for what cannot be drawn or compared."""
    ways = () if extras.against is None else against.parse(extras.against)
    if extras.plot:
        plot.require()
    if extras.start and model not in MODELS:
        raise OptionError(f"--start builds a workload's shapes anew, and {model} is none; give {', '.join(MODELS)}")
    device = detect(arguments.get("device") or "auto")
    subject = find(model, weights, arguments.get("cache_dir"))
    before = _held_before(device)
    with tempfile.TemporaryDirectory() as folder:
        with _open(subject, shown, arguments) as opened:
            held = _held(opened, before)
            figures, records = _measure(opened, device, effort, extras, say)
            told = report(figures, records, held)
            task = against.task_of(figures, Path(folder)) if ways else None
        lines = [against.own_line(told), *against.lines(task, ways, say)] if task else []
    if extras.start:
        records += start_times(subject.name, device.kind)
    if extras.plot:
        plot.latency(told, extras.plot)
    records += against.records(lines, figures)
    others = [r for r in records if not r.metric.startswith(("decode_bs", "ttft_")) and not r.engine]
    text = "\n".join([told.text(), "", *map(line, others), *([f"\n{against.text(lines)}"] if lines else [])])
    stamped = [*map(stamper(device), records)]
    data = told.to_json() | {"records": [asdict(r) for r in stamped], "against": against.to_json(lines)}
    return Told(text, data, stamped)


def scaling_report(
    model: str | None, weights: str, wanted: tuple[Sequence[int], Sequence[int]], grid: bool, new: int,
    picture: Path | None, shown: Shown, say: Say, arguments: Mapping[str, Any],
) -> Told:  # fmt: skip
    """Points by batch and context, an engine built for the largest of each unless one was given."""
    if picture:
        plot.require()
    Effort(new=new, batches=tuple(wanted[0]))
    device = detect(arguments.get("device") or "auto")
    subject = find(model, weights, arguments.get("cache_dir"))
    batches, contexts = wanted[0], wanted[1] or default_contexts(subject, new)
    pairs = scaling.combinations(batches, contexts, grid)
    before = _held_before(device)
    with _open(subject, shown, {**arguments, **scaling_limits(subject, batches, contexts, new)}) as opened:
        pool = int(opened.llm.stats()["memory"]["kv"]) if device.kind == "cuda" else 0
        format, held = opened.engine.format, _held(opened, before) - pool
        roof, records = measured_roof(device, format, opened.figure)
        measured = scaling.Scaling(opened, roof, held, new)
        points = list(measured.points(pairs, say))
        records += [record for point in points for record in point.records(opened.figure)]
    title = f"{subject.name} ({opened.engine.formats}) on {device.name}"
    if picture and points:
        plot.scaling(points, title, picture)
    refused = [{"batch": b, "context": c, "reason": why} for (b, c), why in measured.refused.items()]
    text = "\n".join(
        [title, *columns([scaling.HEAD, *(p.cells() for p in points)]), scaling.LEGEND]
        + [f"left out: batch {x['batch']} at {x['context']} tokens: {x['reason']}" for x in refused]
    )
    data = {"title": title, "points": [asdict(p) for p in points], "refused": refused}
    return Told(text, data, [*map(stamper(device), records)])


def claims_report(
    model: str | None, weights: str, repeats: int, new: int, shown: Shown, arguments: Mapping[str, Any]
) -> Told:
    """What fusing and graphs are worth. Two builds, and their decode rates."""
    device = detect(arguments.get("device") or "auto")
    subject = find(model, weights, arguments.get("cache_dir"))
    if store.is_engine(Path(subject.model)):
        raise OptionError(
            f"{subject.model} is an engine, whose operations are chosen; name the model it was built from"
        )
    with shown as progress:
        records = list(claims(subject, arguments, progress, repeats, new))
    stamped = [*map(stamper(device), records)]
    return Told("\n".join(map(line, records)), {"records": [asdict(r) for r in stamped]}, stamped)


def default_contexts(subject: Subject, new: int) -> tuple[int, ...]:
    """1 k to 32 k, or short ones where the model holds fewer tokens than the first of those."""
    room = _positions(subject) - 2 * new - 8
    return scaling.CONTEXTS if room >= scaling.CONTEXTS[0] else tuple(c for c in scaling.SHORT_CONTEXTS if c <= room)


def scaling_limits(subject: Subject, batches: Sequence[int], contexts: Sequence[int], new: int) -> dict[str, int]:
    """Limits to build for; none of an engine, which keeps its own."""
    if store.is_engine(Path(subject.model)):
        return {}
    most = max(contexts, default=1) + new + scaling.LEAD
    return {"max_batch_size": max(batches), "max_seq_len": min(most, _positions(subject))}


def _positions(subject: Subject) -> int:
    """The most tokens of a request."""
    path = Path(subject.model)
    return (
        store.load(path).profile.max_seq_len
        if store.is_engine(path)
        else ModelDirectory.open(resolve(subject.model)).spec.max_position
    )


def _measure(opened: Opened, device: Device, effort: Effort, extras: Extras, say: Say) -> tuple[Figures, list[Record]]:
    roof, records = measured_roof(device, opened.engine.format, opened.figure)
    figures = Figures(opened, device, roof, effort, say)
    records += figures.all(extras.prefill, extras.throughput)
    return figures, records


def _open(subject: Subject, shown: Shown, arguments: Mapping[str, Any]) -> Opened:
    """Stages are shown until the model is ready: a display that lives on would disturb what is timed."""
    with shown as progress:
        return open_subject(subject, progress, **arguments)


def _held(opened: Opened, before: int) -> int:
    """Bytes that the open engine holds, once all its graphs are captured.

    Nothing else may be done on the device until then, the roof not measured either: torch's random numbers, for one,
    cannot be asked for during a capture.
    """
    settle(opened.llm)
    return held_bytes(opened.engine.device.kind) - before


def _held_before(device: Device) -> int:
    """Bytes in use once the device's context is there, which is not the engine's."""
    if device.kind == "cuda":
        torch.empty(1, device="cuda")
    return held_bytes(device.kind)
