"""What Prometheus reads at /metrics: requests as this process saw them, and the engine as its beats tell it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final, Literal, NamedTuple

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import CollectorRegistry

from penstock.serve.link import State
from penstock.serve.live import Live, device
from penstock.version import __version__

PREFIX: Final = "penstock:"
MODEL: Final = "model_name"

FIRST: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
# The first six are ours: a token every few milliseconds is common, and would be one bucket.
BETWEEN: Final = (
    0.001, 0.002, 0.003, 0.004, 0.005, 0.0075,
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
WHOLE: Final = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
TOKENS: Final = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
NUMBER: Final = (1, 2, 5, 10, 20)
PREEMPTED: Final = (0, 1, 2, 5, 10, 20)

Kind = Literal["counter", "gauge", "histogram"]


class Row(NamedTuple):
    """A metric. `labels` besides the model's name; `buckets`: upper bounds of a histogram's."""

    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: Sequence[float] = ()


_HISTOGRAMS: Final = {
    "time_to_first_token_seconds": Row(
        "histogram", "Seconds from a request's arrival to its first token, as the HTTP process got it.", (), FIRST
    ),
    "inter_token_latency_seconds": Row(
        "histogram",
        "Seconds between a text's tokens, as the HTTP process got them; of k that came at once each counts 1/k of the "
        "wait. Beam searches, which come whole, are left out.",
        (),
        BETWEEN,
    ),
    "request_time_per_output_token_seconds": Row(
        "histogram", "Seconds from a request's first token to its last, by the tokens of its longest text less one.",
        (), BETWEEN,
    ),
    "e2e_request_latency_seconds": Row("histogram", "Seconds from a request's arrival to its end.", (), WHOLE),
    "request_queue_time_seconds": Row("histogram", "Seconds from a request's arrival to its first step.", (), WHOLE),
    "request_prefill_time_seconds": Row(
        "histogram", "Seconds from a request's first step to its first token, in the engine.", (), WHOLE
    ),
    "request_decode_time_seconds": Row(
        "histogram", "Seconds from a request's first token to its last, in the engine.", (), WHOLE
    ),
    "request_inference_time_seconds": Row(
        "histogram", "Seconds from a request's first step to its last token, in the engine.", (), WHOLE
    ),
    "request_prompt_tokens": Row("histogram", "Tokens of a request's prompt.", (), TOKENS),
    "request_generation_tokens": Row("histogram", "Tokens that the engine generated for a request.", (), TOKENS),
    "request_prefill_kv_computed_tokens": Row(
        "histogram", "Tokens of a request's prompt whose KV was computed, not found.", (), TOKENS
    ),
    "request_params_n": Row("histogram", "Texts that a request asked for: n.", (), NUMBER),
    "request_params_max_tokens": Row("histogram", "Tokens that a request asked for at most: max_tokens.", (), TOKENS),
    "request_num_preemptions": Row("histogram", "Times that a request made room for others.", (), PREEMPTED),
    "http_request_duration_seconds": Row(
        "histogram", "Seconds from an HTTP request's arrival to the end of its response.", ("method", "path"), FIRST
    ),
}  # fmt: skip

_COUNTERS: Final = {
    "prompt_tokens_total": Row("counter", "Tokens of prompts whose requests got a first token."),
    "generation_tokens_total": Row("counter", "Tokens that came from the engine."),
    "request_success_total": Row(
        "counter", "Texts that ended, by why; a request for n texts counts n times, an error once.",
        ("finished_reason",),
    ),
    "admission_rejections_total": Row("counter", "Requests refused for want of room, by the limit.", ("reason",)),
    "http_requests_total": Row(
        "counter", "HTTP requests answered, by the path's template and status.", ("method", "path", "status")
    ),
}  # fmt: skip

# Name -> the counter of live.TOTALS.
_OF_ENGINE: Final = {
    "steps_total": ("steps", "Steps that the engine read."),
    "steps_off_fast_path_total": (
        "steps_off_fast_path",
        "Steps that waited for a logits processor or a capture, ran in a larger bucket or node by node.",
    ),
    "steps_with_processors_total": ("processor_steps", "Steps that waited for logits processors."),
    "steps_with_grammars_total": ("guided_steps", "Steps whose sampling waited for the masks of grammars."),
    "step_seconds_total": (
        "device_seconds", "Seconds in which a step on the fast path was under way, as the engine's host sees it.",
    ),
    "step_roof_seconds_total": (
        "roof_seconds",
        "Seconds that the same steps take at best: the longer of bytes (weights, and KV of every row) and operations "
        "at the rates that the build measured on this device. 0 where they are unknown, as on a CPU.",
    ),
    "host_seconds_total": (
        "host_seconds", "Seconds of CPU time of the engine's thread between a step's tokens and the next launch.",
    ),
    "prefix_cache_queries_total": ("prefix_cache_queries", "Tokens of admitted prompts."),
    "prefix_cache_hits_total": ("prefix_cache_hits", "Tokens of admitted prompts whose KV was found."),
    "prefix_cache_evictions_total": ("prefix_cache_evictions", "KV blocks of prefixes that made room for others."),
    "host_cache_hits_total": ("host_cache_hits", "Tokens whose KV came back from the host's memory."),
    "num_preemptions_total": ("preemptions", "Requests that made room for others and were computed anew."),
}  # fmt: skip

# Name -> the key of LLM.stats.
_GAUGES: Final = {
    "num_requests_running": ("requests_running", "Requests in the engine's steps."),
    "num_requests_waiting": ("requests_waiting", "Requests that wait for a place in them."),
    "kv_cache_usage_perc": (
        "kv_cache_usage", "Share of the KV blocks that is held, 0 to 1, of the group of layers with least left.",
    ),
    "kv_cache_waste_ratio": ("kv_cache_waste", "Share of the room in held KV blocks without a token in it, 0 to 1."),
    "kv_blocks": ("kv_blocks", "KV blocks of the engine's pool."),
}  # fmt: skip

TABLE: Final[dict[str, Row]] = {
    **{name: Row("gauge", said) for name, (_, said) in _GAUGES.items()},
    "gpu_busy_ratio": Row(
        "gauge", "Share of the last 2 seconds in which a step was under way, 0 to 1, as the engine's host sees it."
    ),
    "step_roof_share": Row(
        "gauge",
        "Least time of the last 2 seconds' steps (see step_roof_seconds_total) by what they took, 0 to 1; no sample "
        "where the roof is unknown or no step ran.",
    ),
    "engine_state": Row("gauge", "1 for the state that the engine process is in.", ("state",)),
    "build_info": Row("gauge", "1; the labels say what runs.", ("version", "device", "dtype")),
    **{name: Row("counter", said) for name, (_, said) in _OF_ENGINE.items()},
    "engine_restarts_total": Row("counter", "Times that the engine process was started again after it had ended."),
    **_COUNTERS,
    **_HISTOGRAMS,
}
STATES: Final[tuple[State, ...]] = ("loading", "ready", "restarting", "stopped")
REASONS: Final = ("stop", "length", "abort", "timeout", "error")
REJECTIONS: Final = ("max_num_queued_reqs", "max_num_queued_tokens", "engine_unready")


class Histogram:
    """How many observations fell into each bucket; one costs less than a microsecond."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """A value is in the first bucket whose bound is not below it."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        family.add_metric(labels, [*zip(bounds, accumulate(self._counts), strict=True)], self._sum)


class Metrics:
    """All of TABLE. One thread observes and collects: the event loop's."""

    def __init__(self, live: Live, model: Callable[[], str]) -> None:
        """`model`: the name that requests ask for."""
        self._live, self._model = live, model
        self._histograms: dict[str, dict[tuple[str, ...], Histogram]] = {
            name: {} if row.labels else {(): Histogram(row.buckets)} for name, row in _HISTOGRAMS.items()
        }
        self._counts: dict[str, Counter[tuple[str, ...]]] = {name: Counter() for name in _COUNTERS}
        self._counts["request_success_total"].update(dict.fromkeys(zip(REASONS, strict=True), 0))
        self._counts["admission_rejections_total"].update(dict.fromkeys(zip(REJECTIONS, strict=True), 0))
        self.prompt_tokens = self.generation_tokens = 0
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def histogram(self, name: str, *labels: str) -> Histogram:
        """Of these label values; made at first."""
        known = self._histograms[name]
        if labels not in known:
            known[labels] = Histogram(TABLE[name].buckets)
        return known[labels]

    def count(self, name: str, *labels: str) -> None:
        self._counts[name][labels] += 1

    def collect(self) -> Iterator[Metric]:
        """In the order of TABLE."""
        self._live.look()
        model, sampled = self._model(), self._sampled()
        for name, row in TABLE.items():
            labels = (MODEL, *row.labels)
            if row.kind == "histogram":
                family = HistogramMetricFamily(PREFIX + name, row.help, labels=labels)
                for values, histogram in self._histograms[name].items():
                    histogram.add_to(family, (model, *values))
                yield family
                continue
            made = (CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily)(
                PREFIX + name, row.help, labels=labels
            )
            for values, value in sampled[name]:
                made.add_metric((model, *values), value)
            yield made

    def _sampled(self) -> Mapping[str, Iterable[tuple[tuple[str, ...], float]]]:
        """Of each counter and gauge its label values and numbers."""
        live, counts = self._live, {name: [*found.items()] for name, found in self._counts.items()}
        stats, totals, facts, share = live.stats, live.totals, live.link.facts, live.roof_share
        build = (__version__, device(facts), str(facts.get("dtype", "")))
        alone: dict[str, float] = {
            **{name: stats.get(key) or 0 for name, (key, _) in _GAUGES.items()},
            **{name: totals[key] for name, (key, _) in _OF_ENGINE.items()},
            "gpu_busy_ratio": live.busy,
            "engine_restarts_total": live.link.restarts,
            "prompt_tokens_total": self.prompt_tokens,
            "generation_tokens_total": self.generation_tokens,
        }
        return {
            **counts,
            **{name: [((), value)] for name, value in alone.items()},
            "step_roof_share": [] if share is None else [((), share)],
            "engine_state": [((each,), float(each == live.link.state)) for each in STATES],
            "build_info": [(build, 1.0)],
        }
