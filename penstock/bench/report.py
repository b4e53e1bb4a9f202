"""The classic latency report: one row for each prompt length, an average row, and the decode rate by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from penstock.bench import roofs
from penstock.bench.figures import Figures
from penstock.bench.records import Record
from penstock.bench.subject import Opened
from penstock.engine import store
from penstock.engine.profile import Profile

HEAD = ("Prompt Length", "TTFT (ms)", "P99 (ms)", "Compile Time (ms)", "Memory (GB)")
COLUMNS = ("ttft_ms", "p99_ms", "compile_ms", "memory_gb")  # of a Row, as in the average
LEGEND = (
    "Compile Time: the part of the build's kernel selection that timed this length's bucket, by its count of timings.\n"
    "Memory: what the open engine holds beyond the process before it, with the KV of this prompt alone (GB = 1e9 B)."
)


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt length; `roof_ms`: its first token at best."""

    prompt_length: int
    ttft_ms: float
    p99_ms: float
    compile_ms: float
    memory_gb: float
    roof_ms: float


@dataclass(frozen=True)
class Report:
    """The rows, the decode rates' records, and what was left out."""

    model: str
    format: str
    device: str
    rows: tuple[Row, ...]
    decode: tuple[Record, ...]
    left_out: Mapping[str, str]

    @property
    def average(self) -> tuple[float, ...]:
        """TTFT, P99, compile time and memory, each the mean over the lengths."""
        return tuple(mean(getattr(r, name) for r in self.rows) for name in COLUMNS)

    def text(self) -> str:
        lines = [f"{self.model} ({self.format}) on {self.device}", *self._prompts(), *self._decode()]
        return "\n".join([*lines, *(f"left out: {name}: {why}" for name, why in self.left_out.items())])

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model, "format": self.format, "device": self.device,
            "rows": [asdict(row) for row in self.rows],
            "average": dict(zip(COLUMNS, self.average, strict=True)) if self.rows else {},
            "decode": [asdict(record) for record in self.decode], "left_out": dict(self.left_out),
        }  # fmt: skip

    def _prompts(self) -> Iterator[str]:
        if not self.rows:
            return
        cells = [(str(r.prompt_length), *_numbers(r.ttft_ms, r.p99_ms, r.compile_ms, r.memory_gb)) for r in self.rows]
        yield from columns([HEAD, *cells, ("average", *_numbers(*self.average))])
        least = mean(r.roof_ms for r in self.rows)
        yield f"mean TTFT at best {least:.3g} ms: {least / self.average[0]:.1%} of the roof is reached"
        yield LEGEND

    def _decode(self) -> Iterator[str]:
        shown = [r for r in self.decode if r.metric.startswith("decode_bs")]
        if shown:
            cells = [
                (r.metric.removeprefix("decode_bs"), f"{r.value:,.1f}", f"{r.share_of_roof or 0:.1%}") for r in shown
            ]
            yield from columns([("Batch", "decode (tok/s)", "of the roof"), *cells])


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of the classic table, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def report(figures: Figures, records: Sequence[Record], held: int) -> Report:
    """`held`: bytes that the open engine holds in all, its KV pool included."""
    opened = figures.opened
    timed = timings(store.timing(opened.llm.engine_dir))
    rows = tuple(
        Row(
            s.length, s.mean, s.percentile(99), compile_ms(opened, timed, s.length),
            (held - _unused(opened, figures.device.kind, s.length)) / 1e9,
            roofs.first_token_roof(opened.engine, figures.roof, s.length) * 1e3,
        )
        for s in figures.samples
    )  # fmt: skip
    decode = tuple(r for r in records if r.metric.startswith(("decode_bs", "host_us_per_step")))
    engine = opened.engine
    return Report(opened.subject.name, engine.formats, engine.device.name, rows, decode, dict(figures.left_out))


def timings(timing: Mapping[str, Any]) -> dict[str, int]:
    """How many timings the build made at each tuned size, by its name: T64, L8, any."""
    counts: dict[str, int] = {}
    for site in timing.values():
        for point, entries in site.get("points", {}).items():
            counts[point] = counts.get(point, 0) + len(entries)
    return counts


def compile_ms(opened: Opened, timed: Mapping[str, int], length: int) -> float:
    """Of the build's selection, which compiles and times, the share of the tuned size that a prompt runs at."""
    profile, stages = opened.engine.profile, opened.engine.build_seconds
    own = sum(timed.get(point, 0) for point in points(profile, length))
    return stages.get("select", 0.0) * 1e3 * own / max(sum(timed.values()), 1)


def points(profile: Profile, length: int) -> tuple[str, ...]:
    """Names of the tuned sizes that a step of one prompt uses; a longer prompt runs in chunks of the largest."""
    tokens = min(length, profile.max_num_tokens)
    return (f"T{profile.tuned(tokens)}", "L1", "any")


def _unused(opened: Opened, kind: str, length: int) -> int:
    """Bytes of the KV pools that a prompt of this length leaves. Of a CPU's pool only what is used is resident."""
    if kind != "cuda":
        return 0
    blocks = -(-(length + 1) // opened.engine.profile.block_size)
    return int(opened.llm.stats()["memory"]["kv"]) - (1 + blocks) * opened.engine.block_bytes


def _numbers(*values: float) -> tuple[str, ...]:
    return tuple(f"{value:,.2f}" for value in values)
