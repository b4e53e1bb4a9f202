"""The requests of a throughput benchmark: workloads by name, each the same every time, or a trace from a file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.bench.workload import MIXED, mixed_requests, prompt
from penstock.errors import OptionError

Range = tuple[int, int]  # least and most, both included
Encode = Callable[[str], Sequence[int]]

SIGMA, MOST_NEW = 1.2, 2048  # of lognormal outputs
PREFIX_SEED = 999_983  # apart from those of single prompts
MOST_COUNT, MOST_SECONDS = 10**6, 10**6  # of a line: tokens, and when it comes
KEYS = ("prompt_tokens", "prompt", "output_tokens", "arrival")  # of a line of a trace
# What each workload takes besides the number of requests, with what it is where nothing is given.
TAKES: dict[str, dict[str, Any]] = {
    "random": {"num_requests": 256, "input_len": (512, 512), "output_len": (128, 128)},
    "mixed": {"num_requests": MIXED},
    "lognormal": {"num_requests": 512, "input_len": (128, 128), "output_len": (64, 64)},
    "shared-prefix": {"num_requests": 256, "input_len": (64, 64), "output_len": (64, 64), "prefix_len": 2048},
    "interrupted": {"num_requests": 32, "input_len": (8000, 8000)},
    "trace": {"num_requests": None, "trace": None},
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt, the tokens to generate, and when it comes, in seconds from the start. `shared`: tokens at the prompt's
    begin that a request before it has too. `text`: of a trace, where it gave one; the prompt is its ids."""

    prompt: Sequence[int]
    new: int
    arrival: float = 0.0
    shared: int = 0
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """What a caller said of a workload; None: nothing. `rate`: requests a second, arriving by a Poisson process;
    `burstiness`: the shape of a gamma distribution of their gaps instead, 1 the same as Poisson, below it burstier."""

    num_requests: int | None = None
    input_len: Range | None = None
    output_len: Range | None = None
    prefix_len: int | None = None
    trace: Path | None = None
    rate: float | None = None
    burstiness: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A request of a trace: a prompt's length or text."""

    prompt: int | str
    new: int
    arrival: float


@dataclass(frozen=True)
class Workload:
    """A kind of requests, settled. `batch`: at most so many at once, where less than the engine's limit was asked."""

    kind: str
    name: str  # of its figures
    given: Given
    batch: int | None = None
    lines: tuple[Line, ...] = ()

    @property
    def most(self) -> int:
        """Requests."""
        return len(self.lines) or self.given.num_requests or 0

    def requests(self, vocab: int, encode: Encode) -> list[Asked]:
        """All of them, in order of arrival; `vocab`: the largest id of random prompts, `encode`: of a trace's texts."""
        made = self._trace(vocab, encode) if self.kind == "trace" else self._made(vocab)
        if self.given.rate is None:
            return made
        numbers, at = random.Random(1), 0.0
        timed = []
        for each in made:
            timed.append(replace(each, arrival=at))
            at += self._gap(numbers, self.given.rate)
        return timed

    def _gap(self, numbers: random.Random, rate: float) -> float:
        shape = self.given.burstiness
        return numbers.expovariate(rate) if shape is None else numbers.gammavariate(shape, 1 / (rate * shape))

    def _trace(self, vocab: int, encode: Encode) -> list[Asked]:
        """A text keeps its own tokens; a length gets random ones."""
        made = []
        for i, line in enumerate(self.lines):
            if isinstance(line.prompt, str):
                made.append(Asked(encode(line.prompt), line.new, line.arrival, text=line.prompt))
            else:
                made.append(Asked(prompt(line.prompt, i, vocab), line.new, line.arrival))
        return made

    def _made(self, vocab: int) -> list[Asked]:
        given, numbers = self.given, random.Random(0)
        assert given.num_requests is not None
        if self.kind == "mixed":
            return [Asked(ids, new) for ids, new in mixed_requests(given.num_requests, vocab=vocab)]
        ins, outs = given.input_len or (1, 1), given.output_len or (1, 1)
        prefix = prompt(given.prefix_len, PREFIX_SEED, vocab) if given.prefix_len else []
        made = []
        for i in range(given.num_requests):
            length = numbers.randint(*ins)
            new = _lognormal(numbers, outs[0]) if self.kind == "lognormal" else numbers.randint(*outs)
            made.append(Asked([*prefix, *prompt(length, i, vocab)], new, shared=len(prefix) if i else 0))
        return made


def parse(text: str, given: Given) -> list[Workload]:
    """`NAME[:COUNT][@BATCH]`, with commas between; NAME: a key of TAKES, or IN/OUT for fixed lengths.

    Raises OptionError for what is no workload, or was given and is not its own.
    """
    words = [word.strip() for word in text.split(",")]
    if len(words) > 1 and given != Given():
        said = ", ".join(f"--{name}" for name in Given.__slots__ if getattr(given, name) is not None)
        raise OptionError(f"{said}: say of one workload what differs, and {text} are {len(words)}; run them apart")
    return [_one(word, given) for word in words]


def _one(word: str, given: Given) -> Workload:
    kind, batch = _cut(word, "@", "batch")
    kind, count = _cut(kind, ":", "number of requests")
    ins, mark, outs = kind.partition("/")
    fixed: dict[str, Any] = {"num_requests": count} if count else {}
    if mark:
        fixed |= {"input_len": bounds("--workload", ins), "output_len": bounds("--workload", outs)}
        kind = "random"
    if kind not in TAKES:
        raise OptionError(f"--workload {kind!r} is unknown; there are {', '.join(TAKES)}, and lengths like 128/2048")
    full = _settle(kind, given, fixed)
    lines = tuple(read_trace(full.trace, full.num_requests)) if full.trace else ()
    return Workload(kind, _name(kind, full), full, batch, lines)


def _cut(word: str, mark: str, what: str) -> tuple[str, int | None]:
    """What stands before the mark, and the number behind it."""
    head, found, number = word.partition(mark)
    if found and not (number.isdecimal() and int(number)):
        raise OptionError(f"--workload {word!r}: {number!r} is no {what}; give one from 1, like {head}{mark}64")
    return head, int(number) if found else None


def _settle(kind: str, given: Given, fixed: dict[str, Any]) -> Given:
    takes = {**TAKES[kind], **fixed}
    for name in Given.__slots__:
        value = getattr(given, name)
        if value is None:
            continue
        timed = name in ("rate", "burstiness") and kind not in ("interrupted", "trace")
        if name in fixed or (name not in takes and not timed):
            own = ", ".join(f"--{x}" for x in takes if x not in fixed)
            raise OptionError(f"--{name} is not for the workload {kind}, which takes {own}; leave it out")
        if isinstance(value, int | float) and not (math.isfinite(value) and value > 0):
            raise OptionError(f"--{name}={value} must be above 0")
    if given.burstiness is not None and given.rate is None:
        raise OptionError(f"--burstiness={given.burstiness} is of arrivals at a --rate; give one, or leave it out")
    if kind == "trace" and given.trace is None:
        raise OptionError("--workload trace needs --trace FILE, JSON lines with prompt_tokens or prompt, output_tokens")
    return Given(**{**takes, **{n: v for n in Given.__slots__ if (v := getattr(given, n)) is not None}})


def bounds(flag: str, text: str) -> Range:
    """N, or LOW:HIGH. Raises OptionError for anything else."""
    low, mark, high = text.partition(":")
    high = high if mark else low
    if not (low.isdecimal() and high.isdecimal() and 0 < int(low) <= int(high)):
        raise OptionError(f"{flag} {text!r} is neither a length from 1 nor LOW:HIGH; give some like 128 or 64:1024")
    return int(low), int(high)


def read_trace(path: Path, most: int | None = None) -> list[Line]:
    """The first `most` requests of a file; all for None. Raises OptionError for a line that says anything else."""
    try:
        texts = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--trace {path} cannot be read: {error}; name a file of JSON lines") from None
    numbered = [(i, text) for i, text in enumerate(texts, 1) if text.strip()][:most]
    lines = [_line(f"--trace {path}, line {i}", text) for i, text in numbered]
    if not lines:
        raise OptionError(f"--trace {path} holds no request; each line is a JSON object with {', '.join(KEYS)}")
    return sorted(lines, key=lambda line: line.arrival)


def _line(where: str, text: str) -> Line:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or set(data) - set(KEYS) or ("prompt" in data) == ("prompt_tokens" in data):
        raise OptionError(
            f"{where}: {text[:80]!r} is no request; give a JSON object with output_tokens, either prompt_tokens (a "
            f"number) or prompt (text), and perhaps arrival (seconds)"
        )
    text_or_length, new, arrival = data.get("prompt"), data.get("output_tokens"), data.get("arrival", 0.0)
    if "prompt_tokens" in data:
        text_or_length = _count(where, "prompt_tokens", data["prompt_tokens"])
    elif not isinstance(text_or_length, str) or not text_or_length:
        raise OptionError(f"{where}: prompt={text_or_length!r} is no text; give some")
    if isinstance(arrival, bool) or not isinstance(arrival, int | float) or not 0 <= arrival <= MOST_SECONDS:
        raise OptionError(f"{where}: arrival={str(arrival)[:40]} must be seconds from 0 to {MOST_SECONDS}")
    return Line(text_or_length, _count(where, "output_tokens", new), float(arrival))


def _count(where: str, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_COUNT:
        raise OptionError(f"{where}: {name}={str(value)[:40]} must be an integer from 1 to {MOST_COUNT}")
    return value


def _lognormal(numbers: random.Random, median: int) -> int:
    return min(MOST_NEW, max(1, round(numbers.lognormvariate(math.log(median), SIGMA))))


def _name(kind: str, given: Given) -> str:
    """Of the figures: what was measured, by its lengths where those are not the workload's own."""
    if kind == "random":
        assert given.input_len and given.output_len
        return f"offline_{_words(given.input_len)}_{_words(given.output_len)}"
    if kind == "shared-prefix":
        assert given.prefix_len
        return f"shared_prefix_{_thousands(given.prefix_len)}"
    return {"mixed": "throughput_mixed"}.get(kind, kind)


def _words(lengths: Range) -> str:
    return str(lengths[0]) if lengths[0] == lengths[1] else f"{lengths[0]}-{lengths[1]}"


def _thousands(count: int) -> str:
    """2048 -> 2k."""
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)
