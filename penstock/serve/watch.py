"""One observer for each request: metrics, the log's line and the trace's span, in one place."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from penstock.errors import QueueFullError
from penstock.serve.guard import ClientGone
from penstock.serve.link import EngineUnready
from penstock.serve.logs import say
from penstock.serve.metrics import REASONS, REJECTIONS, Metrics
from penstock.serve.serving import Answered
from penstock.serve.tracing import Tracer
from penstock.serve.wire import Part, Submit, Times

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_POLLED: Final = frozenset({"/health", "/metrics", "/live"})  # asked for every few seconds: no line while all is well
_CARRIED: Final = (b"traceparent", b"tracestate")


@dataclass
class Totals:
    """Of the engine's requests that one HTTP request made."""

    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    error: str | None = None

    def fields(self) -> dict[str, object]:
        """For the log's line."""
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "queue_seconds": _rounded(self.queue_seconds),
            "first_token_seconds": _rounded(self.first_token_seconds),
            "finish": ",".join(f"{reason}" for reason in sorted(self.reasons)) or None,
            "error": self.error,
        }


class Observer:
    """Of one server; its methods are called on the event loop, and neither raise nor wait."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self.metrics, self.tracer = metrics, tracer
        self._open: dict[str, Totals] = {}  # by the HTTP request's id

    def started(
        self, request_id: str, new: Submit, max_tokens: int | None, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> Observed:
        """A request goes to the engine. `request_id`: the HTTP request's; `headers`: its headers."""
        totals = self._open.setdefault(request_id, Totals())
        totals.requests += 1
        carried = {k.decode("latin-1"): v.decode("latin-1") for k, v in headers if self.tracer and k in _CARRIED}
        return Observed(self, new, max_tokens, totals, carried)

    def answered(self, record: Answered) -> None:
        """An HTTP request ended: a hook of the server's."""
        totals = self._open.pop(record.request_id, None)
        method = record.method if record.method in _METHODS else "other"
        route, status = record.route or "unknown", str(record.status or 499)
        self.metrics.count("http_requests_total", method, route, status)
        self.metrics.histogram("http_request_duration_seconds", method, route).observe(record.seconds)
        if record.status == 503 and route != "/health":
            self.metrics.count("admission_rejections_total", "engine_unready")
        fields = {
            "request_id": record.request_id,
            "method": method,
            "route": route,
            "status": record.status or None,
            "seconds": _rounded(record.seconds),
            "client_gone": record.gone or None,
            **(totals.fields() if totals else {}),
        }
        say("request", fields, logging.DEBUG if route in _POLLED and record.status < 400 else logging.INFO)

    def failed(self, request_id: str, error: Exception) -> None:
        """An HTTP request met an error that nobody expected: a hook of the server's."""
        say("a request failed", {"request_id": request_id}, logging.ERROR, error)


class Observed:
    """One request of the engine's. `parts` for all that came, in order; `ended` once, whatever happened."""

    __slots__ = (
        "_between",
        "_carried",
        "_count",
        "_first",
        "_last",
        "_max_tokens",
        "_metrics",
        "_new",
        "_observer",
        "_reasons",
        "_started",
        "_times",
        "_totals",
    )  # fmt: skip

    def __init__(
        self, observer: Observer, new: Submit, max_tokens: int | None, totals: Totals, carried: Mapping[str, str]
    ) -> None:
        self._observer, self._metrics, self._new, self._max_tokens = observer, observer.metrics, new, max_tokens
        self._totals, self._carried = totals, carried
        self._started = new.arrival or time.monotonic()
        self._between = self._metrics.histogram("inter_token_latency_seconds")
        self._first: float | None = None  # when the first token came
        self._last: dict[int, float] = {}  # of each text, when its newest token came
        self._count: Counter[int] = Counter()  # and how many
        self._reasons: dict[int, str] = {}
        self._times: dict[int, Times] = {}

    def parts(self, parts: Sequence[Part]) -> None:
        """They have just come from the engine."""
        now, last = time.monotonic(), self._last
        for part in parts:
            index, count = part.index, len(part.tokens)
            if count:
                since = last.get(index)
                if since is not None:
                    self._between.observe((now - since) / count, count)
                else:
                    self._begin(now)
                    if count > 1 and part.score is None:
                        self._between.observe(0.0, count - 1)
                last[index] = now
                self._count[index] += count
                self._metrics.generation_tokens += count
            if part.times is not None:
                self._times[index] = part.times
            if part.finish is not None:
                self._reasons[index] = part.finish

    def _begin(self, now: float) -> None:
        """A text has its first token."""
        if self._first is not None:
            return
        self._first = now
        self._metrics.prompt_tokens += len(self._new.prompt)
        self._metrics.histogram("time_to_first_token_seconds").observe(now - self._started)

    def ended(self, error: BaseException | None = None, reasons: Mapping[int, str] | None = None) -> None:
        """`reasons`: why texts ended, by index, where this process ended them: a stop string's "stop"."""
        now = time.monotonic()
        found = {**self._reasons, **(reasons or {})}
        why = [*found.values()] if error is None else ["abort" if _is_gone(error) else "error"]
        for reason in why:
            self._metrics.count("request_success_total", reason if reason in REASONS else "error")
        if isinstance(error, QueueFullError):
            self._metrics.count("admission_rejections_total", _limit(error))
        said = type(error).__name__ if error is not None and not _is_gone(error) else None
        seconds = self._seconds(now)
        if not isinstance(error, QueueFullError | EngineUnready):
            self._observe(now, seconds)
        self._add_up(seconds, why, said)
        if tracer := self._observer.tracer:
            tracer.span(self._started, now, self._carried, self._attributes(now, seconds), said)

    def _seconds(self, now: float) -> dict[str, float | None]:
        """How long each stage took, as far as the engine told: what it says at a text's end is missing of one that this
        process ended."""
        times = [*self._times.values()]
        admitted = min([each.admitted for each in times if each.admitted is not None], default=None)
        first = min([each.first_token for each in times if each.first_token is not None], default=None)
        last = max([each.finished for each in times if each.finished is not None], default=now)
        return {
            "queue": None if admitted is None else admitted - self._started,
            "prefill": None if admitted is None or first is None else first - admitted,
            "decode": None if first is None else last - first,
            "inference": None if admitted is None else last - admitted,
            "first_token": None if self._first is None else self._first - self._started,
        }

    def _observe(self, now: float, seconds: Mapping[str, float | None]) -> None:
        """Into the histograms of whole requests."""
        params, longest = self._new.params, max(self._count.values(), default=0)
        times = [*self._times.values()]
        found: dict[str, float | None] = {
            "e2e_request_latency_seconds": now - self._started,
            **{f"request_{name}_time_seconds": seconds[name] for name in ("queue", "prefill", "decode", "inference")},
            "request_prompt_tokens": len(self._new.prompt),
            "request_generation_tokens": self._count.total(),
            "request_params_n": params.get("n", 1),
            "request_params_max_tokens": self._max_tokens,
        }
        if times:
            reused = max(each.reused_tokens for each in times)
            found["request_prefill_kv_computed_tokens"] = len(self._new.prompt) - reused
            found["request_num_preemptions"] = sum(each.preemptions for each in times)
        if self._first is not None and longest > 1:
            passed = max(self._last.values()) - self._first
            found["request_time_per_output_token_seconds"] = passed / (longest - 1)
        for name, value in found.items():
            if value is not None:
                self._metrics.histogram(name).observe(value)

    def _add_up(self, seconds: Mapping[str, float | None], why: Iterable[str], error: str | None) -> None:
        """Into what the HTTP request's line says; of times the longest."""
        totals = self._totals
        totals.prompt_tokens += len(self._new.prompt)
        totals.generation_tokens += self._count.total()
        totals.queue_seconds = _longer(totals.queue_seconds, seconds["queue"])
        totals.first_token_seconds = _longer(totals.first_token_seconds, seconds["first_token"])
        totals.reasons.update(why)
        totals.error = error or totals.error

    def _attributes(self, now: float, seconds: Mapping[str, float | None]) -> dict[str, Any]:
        """Of the span, by the names that vLLM uses."""
        params = self._new.params
        return {
            "gen_ai.request.id": self._new.id,
            "gen_ai.request.temperature": params.get("temperature"),
            "gen_ai.request.top_p": params.get("top_p"),
            "gen_ai.request.max_tokens": self._max_tokens,
            "gen_ai.request.n": params.get("n", 1),
            "gen_ai.usage.num_sequences": len(self._count),
            "gen_ai.usage.prompt_tokens": len(self._new.prompt),
            "gen_ai.usage.completion_tokens": self._count.total(),
            "gen_ai.response.finish_reasons": [*self._reasons.values()] or None,
            "gen_ai.latency.time_in_queue": seconds["queue"],
            "gen_ai.latency.time_to_first_token": seconds["first_token"],
            "gen_ai.latency.time_in_model_prefill": seconds["prefill"],
            "gen_ai.latency.time_in_model_decode": seconds["decode"],
            "gen_ai.latency.time_in_model_inference": seconds["inference"],
            "gen_ai.latency.e2e": now - self._started,
        }


def _is_gone(error: BaseException) -> bool:
    return isinstance(error, ClientGone | asyncio.CancelledError | GeneratorExit)


def _limit(error: QueueFullError) -> str:
    """The limit that the message names."""
    return next((name for name in REJECTIONS if name in str(error)), REJECTIONS[0])


def _longer(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else max(one, other)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
