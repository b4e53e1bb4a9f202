"""What a run against a server tells: latencies of the requests that succeeded, rates, errors, the client's own part."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import Any, Final

from penstock.bench.records import Maker, Record
from penstock.bench.result import SIDE
from penstock.bench.serve.ask import Outcome
from penstock.bench.serve.drive import Run
from penstock.bench.workload import percentile
from penstock.errors import OptionError

Goals = Mapping[str, float]  # milliseconds at most, by name

NAMES: Final = {
    "ttft": "Time to First Token", "tpot": "Time per Output Token (excl. 1st token)", "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}  # fmt: skip
PERCENTILES: Final = (90, 95, 99)
SLOW_CLIENT: Final = 5.0  # milliseconds of lag at P99 from which the figures are the client's as well
WIDTH: Final = 50


def goals(texts: Sequence[str]) -> dict[str, float]:
    """`ttft:200,tpot:50`. Raises OptionError for anything else."""
    found: dict[str, float] = {}
    for word in (word for text in texts for word in text.replace(",", " ").split()):
        name, _, number = word.partition(":")
        if name not in ("ttft", "tpot", "e2el") or not number.replace(".", "", 1).isdecimal() or not float(number):
            raise OptionError(f"--goodput {word!r} is none of ttft:MS, tpot:MS, e2el:MS, each above 0")
        if name in found:
            raise OptionError(f"--goodput names {name} twice; give one limit for each")
        found[name] = float(number)
    return found


@dataclass(frozen=True)
class Figures:
    """Of one run. `name`: of its records. `at_once`, `rate`: what was asked, None: no limit."""

    name: str
    run: Run
    at_once: int | None = None
    rate: float | None = None
    goals: Goals | None = None

    @cached_property
    def good(self) -> list[Outcome]:
        return [it for it in self.run.outcomes if not it.error]

    @property
    def errors(self) -> dict[str, int]:
        return dict(Counter(it.error for it in self.run.outcomes if it.error).most_common())

    @property
    def details(self) -> dict[str, str]:
        """By kind of error, what was said the first time."""
        return {it.error: it.detail for it in reversed(self.run.outcomes) if it.error}

    @property
    def prompt_tokens(self) -> int:
        return sum(it.prompt_tokens for it in self.good)

    @property
    def output_tokens(self) -> int:
        return sum(it.output_tokens for it in self.good)

    @property
    def chunks(self) -> int:
        return sum(len(it.stamps) for it in self.good)

    @cached_property
    def times(self) -> dict[str, list[float]]:
        """Milliseconds, by the keys of NAMES; between tokens: between chunks."""
        per_token = (it.per_token for it in self.good)
        found = {
            "ttft": [it.first for it in self.good], "tpot": [x for x in per_token if x is not None],
            "itl": [gap for it in self.good for gap in it.gaps], "e2el": [it.whole for it in self.good],
        }  # fmt: skip
        return {name: [1e3 * x for x in values] for name, values in found.items()}

    @property
    def peak_rate(self) -> float:
        """Tokens in the best second; a chunk has its share of its request's."""
        seconds: defaultdict[int, float] = defaultdict(float)
        for it in self.good:
            share = it.output_tokens / len(it.stamps)
            for at in it.stamps:
                seconds[int(at)] += share
        return max(seconds.values(), default=0.0)

    @property
    def goodput(self) -> float:
        """Requests a second that kept every goal; one of a single token has no time per token to keep."""
        return sum(map(self._kept, self.good)) / self.run.seconds

    def _kept(self, it: Outcome) -> bool:
        took = {"ttft": it.first, "tpot": it.per_token or 0.0, "e2el": it.whole}
        return all(1e3 * took[name] <= most for name, most in (self.goals or {}).items())

    @property
    def late(self) -> list[float]:
        """Milliseconds from a planned time to the request: it waited for a place, or the client was slow."""
        return [1e3 * max(0.0, it.begun - it.planned) for it in self.run.outcomes if it.planned]

    @property
    def lag(self) -> tuple[float, float]:
        """Milliseconds that the client's event loop was late: median and P99."""
        lags = self.run.lags or (0.0,)
        return 1e3 * percentile(lags, 50), 1e3 * percentile(lags, 99)

    @property
    def warnings(self) -> Iterator[str]:
        """What a reader of the figures must know."""
        lag = self.lag[1]
        if lag > SLOW_CLIENT:
            yield (
                f"the client itself was {lag:.1f} ms late at P99 (CPU {self.run.cpu:.0%} of a core): latencies hold "
                f"as much of its own; spread the load over more clients"
            )
        if uncounted := sum(not it.counted for it in self.good):
            yield f"{uncounted} answers came without usage: each of their chunks counts as one token"
        if self.chunks and self.output_tokens / self.chunks > 1.05:
            yield f"a chunk holds {self.output_tokens / self.chunks:.2f} tokens: inter-token latency is between chunks"
        for kind, said in self.details.items():
            yield f"{self.errors[kind]} x {kind}: {said}"

    def facts(self) -> dict[str, tuple[float, str]]:
        """Value and unit, besides the output rate."""
        run, seconds = self.run, self.run.seconds
        lag50, lag99 = self.lag
        found: dict[str, tuple[float, str]] = {
            "requests": (len(self.good), "requests"), "failed": (len(run.outcomes) - len(self.good), "requests"),
            "seconds": (seconds, "s"), "requests_per_s": (len(self.good) / seconds, "req/s"),
            "total": ((self.prompt_tokens + self.output_tokens) / seconds, "tok/s"),
            "peak_output": (self.peak_rate, "tok/s"), "peak_concurrency": (run.peak, "requests"),
            "prompt_tokens": (self.prompt_tokens, "tokens"), "output_tokens": (self.output_tokens, "tokens"),
            "chunks": (self.chunks, "chunks"),
            "client_lag_p50_ms": (lag50, "ms"), "client_lag_p99_ms": (lag99, "ms"),
            "client_cpu": (100 * run.cpu, "%"),
        }  # fmt: skip
        if self.goals:
            found["goodput"] = (self.goodput, "req/s")
        if self.late:
            found["late_p99_ms"] = (percentile(self.late, 99), "ms")
        for name, values in self.times.items():
            found |= {f"{name}_{key}_ms": (value, "ms") for key, value in _spread(values).items()}
        return found

    @property
    def rate_of_output(self) -> float:
        return self.output_tokens / self.run.seconds

    def records(self, figure: Maker, note: str) -> Iterator[Record]:
        yield figure(self.name, self.rate_of_output, "tok/s", note=note)
        for name, (value, unit) in self.facts().items():
            yield figure(f"{self.name}{SIDE}{name}", value, unit)

    def to_json(self) -> dict[str, Any]:
        facts = {name: value for name, (value, _) in self.facts().items()}
        return {
            "name": self.name, "max_concurrency": self.at_once, "request_rate": self.rate, "goals": self.goals,
            "output_tokens_per_s": self.rate_of_output, **facts, "errors": self.errors, "error_details": self.details,
            "warnings": [*self.warnings],
        }  # fmt: skip

    def text(self) -> str:
        """The block that users of other servers' benchmarks know."""
        it = {name: value for name, (value, _) in self.facts().items()}
        rows: list[tuple[str, object]] = [
            ("Successful requests:", len(self.good)), ("Failed requests:", int(it["failed"])),
            ("Maximum request concurrency:", self.at_once or "unlimited"),
            ("Request rate configured (RPS):", "all at once" if self.rate is None else self.rate),
            ("Benchmark duration (s):", it["seconds"]), ("Total input tokens:", self.prompt_tokens),
            ("Total generated tokens:", self.output_tokens), ("Request throughput (req/s):", it["requests_per_s"]),
            *([("Request goodput (req/s):", it["goodput"])] if self.goals else []),
            ("Output token throughput (tok/s):", self.rate_of_output),
            ("Peak output token throughput (tok/s):", it["peak_output"]),
            ("Peak concurrent requests:", self.run.peak), ("Total token throughput (tok/s):", it["total"]),
        ]  # fmt: skip
        lines = [f" Serving Benchmark Result: {self.name} ".center(WIDTH, "="), *map(_row, rows)]
        for name, title in NAMES.items():
            if self.times[name]:
                lines += [title.center(WIDTH, "-"), *map(_row, _latencies(name, self.times[name]))]
        own: list[tuple[str, object]] = [
            ("Event loop lag P50 (ms):", it["client_lag_p50_ms"]),
            ("Event loop lag P99 (ms):", it["client_lag_p99_ms"]),
            *([("Sent behind its time P99 (ms):", it["late_p99_ms"])] if self.late else []),
            ("CPU (% of a core):", it["client_cpu"]),
        ]  # fmt: skip
        return "\n".join([*lines, "The client itself".center(WIDTH, "-"), *map(_row, own), "=" * WIDTH, *self.warnings])


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and percentiles; nothing where there is no value."""
    if not values:
        return {}
    of = {f"p{q}": percentile(values, q) for q in PERCENTILES}
    return {"mean": mean(values), "median": percentile(values, 50), **of}


def _latencies(name: str, values: Sequence[float]) -> Iterator[tuple[str, object]]:
    for key, value in _spread(values).items():
        yield f"{key.capitalize()} {name.upper()} (ms):", value


def _row(row: tuple[str, object]) -> str:
    label, value = row
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<{WIDTH - 10}}{shown:<10}".rstrip()
