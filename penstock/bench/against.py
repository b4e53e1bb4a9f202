"""Penstock beside its peers on this machine: the same shapes, prompts and definitions, a process for each peer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from penstock import formats
from penstock.bench.figures import Figures
from penstock.bench.latency import PROMPT
from penstock.bench.peers.task import MARK, Answer, Task
from penstock.bench.records import Record
from penstock.bench.report import Report, columns
from penstock.errors import OptionError

VLLM = "vllm"
WAYS = ("eager", "compile", "cudagraph", "compile+cudagraph", VLLM)
SAMPLES = 30  # first tokens of a peer at each length, at most
PATIENCE = 3600.0  # seconds for one peer
HEAD = ("", "TTFT (ms)", "P99 (ms)", "decode, batch 1 (tok/s)", "Memory (GB)", "TTFT", "decode")
LEGEND = (
    "The last two columns: times faster than eager. eager ... compile+cudagraph: Hugging Face transformers, random\n"
    "weights of the same config, a plain loop of forward calls. Memory: of a peer the most that torch allocated, of\n"
    "vllm the whole GPU's with the pool that it reserves, of penstock the mean of the report above."
)


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the comparison."""

    name: str
    answer: Answer


def parse(text: str) -> tuple[str, ...]:
    """Names of peers, in the order given. Raises OptionError for one that is none."""
    ways = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for way in ways:
        if way not in WAYS:
            raise OptionError(f"--against {way!r} is not one of {', '.join(WAYS)}; give some, with commas between")
    if not ways:
        raise OptionError(f"--against {text!r} names no peer; give some of {', '.join(WAYS)}")
    return ways


def task_of(figures: Figures, folder: Path) -> Task:
    """What every peer is asked: the config of the engine, and what was measured of it. Call before it is shut down."""
    engine, effort = figures.opened.engine, figures.effort
    (folder / "config.json").write_text(json.dumps(dict(engine.source["config"])))
    lengths = tuple(s.length for s in figures.samples)
    if not lengths:
        raise OptionError("--against compares first tokens, and no prompt length could be measured; give --lengths")
    dtype = formats.parse(engine.format).torch_dtype
    room = figures.opened.limits["max_seq_len"] - effort.new
    return Task(
        "", str(folder), dtype, figures.device.kind, lengths, min(SAMPLES, effort.samples), min(PROMPT, room),
        effort.new, figures.opened.vocab,
    )  # fmt: skip


def own_line(report: Report) -> Line:
    """Penstock's row, from what was reported; without a decode rate where batch 1 was not measured."""
    decode = next((r.value for r in report.decode if r.metric == "decode_bs1"), 0.0)
    ttft, p99, _, memory = report.average
    return Line("penstock", Answer(ttft, p99, decode, memory))


def lines(task: Task, ways: Sequence[str], say: Callable[[str], None]) -> Iterator[Line]:
    """Each peer's row as soon as it is there."""
    for way in ways:
        say(f"measuring {way} ...")
        yield Line(way, ask(replace(task, way=way)))


def ask(task: Task, command: Sequence[str] = (), patience: float = PATIENCE) -> Answer:
    """A peer's answer. A process that crashes or says nothing is a refusal with its last words."""
    module = "vllm_offline" if task.way == VLLM else "hugging_face"
    words = [*(command or (sys.executable, "-m", f"penstock.bench.peers.{module}")), json.dumps(asdict(task))]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        return Answer(refused=f"nothing after {patience:.0f} s")
    answers = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if answers:
        return Answer(**json.loads(answers[-1]))
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
    return Answer(refused=f"its process ended with {done.returncode}: {last[:300]}")


def text(found: Sequence[Line]) -> str:
    """The comparison, and below it why rows are missing."""
    good = [line for line in found if not line.answer.refused]
    eager = next((line.answer for line in good if line.name == "eager"), None)
    cells = [(line.name, *_cells(line.answer, eager)) for line in good]
    missing = [f"left out: {line.name}: {line.answer.refused}" for line in found if line.answer.refused]
    return "\n".join([*columns([HEAD, *cells]), LEGEND, *missing])


def to_json(found: Sequence[Line]) -> list[dict[str, Any]]:
    return [
        {"name": line.name, **({"refused": line.answer.refused} if line.answer.refused else _facts(line.answer))}
        for line in found
    ]


def _facts(answer: Answer) -> dict[str, Any]:
    """A rate that was not measured is None."""
    return {**asdict(answer), "tokens_per_s": answer.tokens_per_s or None}


def records(found: Sequence[Line], figures: Figures) -> Iterator[Record]:
    """The peers' figures, with whose they are."""
    for line in found:
        answer = line.answer
        if line.name == "penstock" or answer.refused:
            continue
        peer = f"{answer.version} {line.name}" if line.name != VLLM else answer.version
        note = f"random weights; {min(SAMPLES, figures.effort.samples)} samples a length"
        for metric, value, unit in (
            ("ttft_mean_ms", answer.ttft_ms, "ms"), ("ttft_p99_ms", answer.p99_ms, "ms"),
            ("decode_bs1", answer.tokens_per_s, "tok/s"), ("memory_gb", answer.memory_gb, "GB"),
        ):  # fmt: skip
            yield figures.figure(metric, value, unit, note=note, engine=peer)


def _cells(answer: Answer, eager: Answer | None) -> tuple[str, ...]:
    """`-` stands for what was not measured."""
    own = (answer.ttft_ms, answer.p99_ms, answer.tokens_per_s, answer.memory_gb)
    ratios = (0.0, 0.0)
    if eager is not None:
        ratios = _ratio(eager.ttft_ms, answer.ttft_ms), _ratio(answer.tokens_per_s, eager.tokens_per_s)
    times = (f"{ratio:.2f}x" if ratio else "-" for ratio in ratios)
    return (*(f"{value:,.2f}" if value else "-" for value in own), *times)


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0
