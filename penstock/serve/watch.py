"""One observer for each of the engine's requests: metrics, the log's line and the trace's span, in one place."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from penstock.errors import QueueFullError
from penstock.serve.guard import WATCHED, ClientGone
from penstock.serve.logs import say
from penstock.serve.metrics import REASONS, REJECTIONS, Metrics
from penstock.serve.serving import Answered, Hooks
from penstock.serve.tracing import Tracer
from penstock.serve.wire import Part, Submit, Times

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CARRIED: Final = (b"traceparent", b"tracestate")
_STAGES: Final = ("queue", "prefill", "decode", "inference")

Headers = Sequence[tuple[bytes, bytes]]


class Watch:
    """Of one server: what its hooks call, on the event loop."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self.metrics, self.tracer = metrics, tracer
        self._open: dict[str, Totals] = {}  # of HTTP requests that have reached the engine, by their ids

    def join(self, hooks: Hooks) -> None:
        """Hear of everything."""
        hooks.answered.append(self.answered)
        hooks.failed.append(self.failed)
        hooks.started = self.started

    def started(self, request_id: str, new: Submit, max_tokens: int | None, headers: Headers) -> Watched:
        """A request goes to the engine; of an HTTP request there may be several."""
        carried = {k.decode("latin-1"): v.decode("latin-1") for k, v in headers if self.tracer and k in _CARRIED}
        return Watched(self, new, max_tokens, self._open.setdefault(request_id, Totals(new.id)), carried)

    def answered(self, record: Answered) -> None:
        """An HTTP request ended."""
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
            "refused": record.refused,
            **(totals.fields() if totals else {}),
        }
        say("request", fields, logging.DEBUG if route in WATCHED and record.status in (200, 503) else logging.INFO)

    def failed(self, request_id: str, error: Exception) -> None:
        """An HTTP request met an error that nobody expected."""
        say("a request failed", {"request_id": request_id}, logging.ERROR, error)


@dataclass
class Totals:
    """Of the engine's requests that one HTTP request made; of times the longest. `id`: of the first, as in its answer
    and in reports of crashes."""

    id: str
    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)
    error: str | None = None

    def fields(self) -> dict[str, object]:
        """For the log's line."""
        return {
            "id": self.id,
            "prompts": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            **{f"{name}_seconds": _rounded(value) for name, value in self.seconds.items()},
            "finish": ",".join(sorted(self.reasons)) or None,
            "error": self.error,
        }


class Watched:
    """One of the engine's requests: a prompt, and the texts that go on with it."""

    def __init__(
        self, watch: Watch, new: Submit, max_tokens: int | None, totals: Totals, carried: Mapping[str, str]
    ) -> None:
        self._metrics, self._tracer = watch.metrics, watch.tracer
        self._new, self._max_tokens, self._totals, self._carried = new, max_tokens, totals, carried
        self._arrival = new.arrival or time.monotonic()
        self._between = self._metrics.histogram("inter_token_latency_seconds")
        self._first: float | None = None  # when the first token came
        self._last: dict[int, float] = {}  # of each text, when its newest token came
        self._counts: Counter[int] = Counter()  # and how many
        self._reasons: dict[int, str] = {}
        self._times: dict[int, Times] = {}

    def parts(self, parts: Sequence[Part]) -> None:
        """They have just come from the engine."""
        now, last = time.monotonic(), self._last
        for part in parts:
            index, count = part.index, len(part.tokens)
            if part.finish is not None:
                self._reasons[index] = part.finish
            if part.times is not None:
                self._times[index] = part.times
            if not count:
                continue
            since = last.get(index)
            if since is not None:
                self._between.observe((now - since) / count, count)
            elif part.score is None and count > 1:
                self._between.observe(0.0, count - 1)
            last[index] = now
            self._counts[index] += count
            self._metrics.generation_tokens += count
            if self._first is None:
                self._begin(now)

    def _begin(self, now: float) -> None:
        """It has its first token."""
        self._first = now
        self._metrics.prompt_tokens += len(self._new.prompt)
        self._metrics.histogram("time_to_first_token_seconds").observe(now - self._arrival)

    def ended(self, error: BaseException | None = None, reasons: Mapping[int, str] | None = None) -> None:
        """Once, whatever happened; see `serving.Watcher`."""
        now, gone = time.monotonic(), isinstance(error, ClientGone | asyncio.CancelledError | GeneratorExit)
        found = {**self._reasons, **(reasons or {})}
        why = [*found.values()] or ["abort"] if error is None else ["abort" if gone else "error"]
        said = None if error is None or gone else type(error).__name__
        for reason in why:
            self._metrics.count("request_success_total", reason if reason in REASONS else "error")
        seconds = self._seconds(now)
        if isinstance(error, QueueFullError):
            self._metrics.count("admission_rejections_total", _limit(error))
        else:
            self._observe(seconds)
        self._add_up(seconds, why, said)
        if self._tracer is not None:
            self._tracer.span(self._arrival, now, self._carried, self._attributes(seconds, why), said)

    def _seconds(self, now: float) -> dict[str, float]:
        """Of each stage, as far as the engine told: of a text that this process ended it says no end."""
        times = [*self._times.values()]
        admitted = [each.admitted for each in times if each.admitted is not None]
        first = [each.first_token for each in times if each.first_token is not None]
        last = max([each.finished or now for each in times], default=now)
        found = {"e2e": now - self._arrival}
        if admitted:
            found |= {"queue": min(admitted) - self._arrival, "inference": last - min(admitted)}
        if admitted and first:
            found |= {"prefill": min(first) - min(admitted), "decode": last - min(first)}
        if self._first is not None:
            found["first_token"] = self._first - self._arrival
        return found

    def _observe(self, seconds: Mapping[str, float]) -> None:
        """Into the histograms of whole requests."""
        prompt, times = len(self._new.prompt), [*self._times.values()]
        found = {
            "e2e_request_latency_seconds": seconds["e2e"],
            **{f"request_{name}_time_seconds": seconds[name] for name in _STAGES if name in seconds},
            "request_prompt_tokens": prompt,
            "request_generation_tokens": self._counts.total(),
            "request_params_n": self._new.params.get("n", 1),
        }
        if self._max_tokens is not None:
            found["request_params_max_tokens"] = self._max_tokens
        if times:
            found["request_prefill_kv_computed_tokens"] = prompt - max(each.reused_tokens for each in times)
            found["request_num_preemptions"] = sum(each.preemptions for each in times)
        longest = max(self._counts.values(), default=0)
        if self._first is not None and longest > 1:
            passed = max(self._last.values()) - self._first
            found["request_time_per_output_token_seconds"] = passed / (longest - 1)
        for name, value in found.items():
            self._metrics.histogram(name).observe(value)

    def _add_up(self, seconds: Mapping[str, float], why: Iterable[str], error: str | None) -> None:
        totals = self._totals
        totals.requests += 1
        totals.prompt_tokens += len(self._new.prompt)
        totals.generation_tokens += self._counts.total()
        for name in ("queue", "first_token", "prefill", "decode"):
            if name in seconds:
                totals.seconds[name] = max(totals.seconds.get(name, 0.0), seconds[name])
        totals.reasons.update(why)
        totals.error = error or totals.error

    def _attributes(self, seconds: Mapping[str, float], why: Sequence[str]) -> dict[str, Any]:
        """Of the span, by the names that vLLM uses."""
        params = self._new.params
        times = {f"gen_ai.latency.time_in_model_{name}": seconds.get(name) for name in _STAGES[1:]}
        return {
            "gen_ai.request.id": self._new.id,
            "gen_ai.request.temperature": params.get("temperature"),
            "gen_ai.request.top_p": params.get("top_p"),
            "gen_ai.request.max_tokens": self._max_tokens,
            "gen_ai.request.n": params.get("n", 1),
            "gen_ai.response.finish_reasons": [*why],
            "gen_ai.usage.num_sequences": len(self._counts),
            "gen_ai.usage.prompt_tokens": len(self._new.prompt),
            "gen_ai.usage.completion_tokens": self._counts.total(),
            "gen_ai.latency.time_in_queue": seconds.get("queue"),
            "gen_ai.latency.time_to_first_token": seconds.get("first_token"),
            **times,
            "gen_ai.latency.e2e": seconds["e2e"],
        }


def _limit(error: QueueFullError) -> str:
    """The limit that the message names."""
    return next((name for name in REJECTIONS if name in str(error)), REJECTIONS[0])


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
