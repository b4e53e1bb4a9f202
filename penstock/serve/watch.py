"""One observer for each request for text: metrics, the log's line and the trace's span, in one place."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from penstock.errors import QueueFullError
from penstock.serve.link import EngineUnready
from penstock.serve.logs import say
from penstock.serve.metrics import REASONS, REJECTIONS, Metrics
from penstock.serve.observe import Ended, Started
from penstock.serve.serving import Answered, Hooks
from penstock.serve.tracing import Tracer
from penstock.serve.wire import Part, Times

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_POLLED: Final = frozenset({"/health", "/metrics", "/live"})  # asked for every few seconds: no line while all is well
_CARRIED: Final = ("traceparent", "tracestate")


class Watch:
    """Of one server: what its hooks call, on the event loop."""

    def __init__(self, metrics: Metrics, tracer: Tracer | None = None) -> None:
        self.metrics, self.tracer = metrics, tracer
        self._open: dict[str, Watched] = {}  # requests for text whose answer has not ended, by the HTTP request's id

    def join(self, hooks: Hooks) -> None:
        """Hear of everything."""
        hooks.answered.append(self.answered)
        hooks.failed.append(self.failed)
        hooks.started.append(self.started)

    def started(self, new: Started) -> Watched:
        """A request for text goes to the engine."""
        self._open[new.request_id] = watched = Watched(self, new)
        return watched

    def answered(self, record: Answered) -> None:
        """An HTTP request ended."""
        watched = self._open.pop(record.request_id, None)
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
            "seconds": round(record.seconds, 6),
            "client_gone": record.gone or None,
            **(watched.fields() if watched else {}),
        }
        say("request", fields, logging.DEBUG if route in _POLLED and record.status < 400 else logging.INFO)

    def failed(self, request_id: str, error: Exception) -> None:
        """An HTTP request met an error that nobody expected."""
        say("a request failed", {"request_id": request_id}, logging.ERROR, error)


class Watched:
    """A request for text: one, whatever number of prompts and texts it is for."""

    def __init__(self, watch: Watch, new: Started) -> None:
        self._watch, self._metrics, self._new = watch, watch.metrics, new
        self._between = self._metrics.histogram("inter_token_latency_seconds")
        self._first: float | None = None  # when the first token came
        self._last: dict[tuple[str, int], float] = {}  # of each text, when its newest token came
        self._counts: Counter[tuple[str, int]] = Counter()  # and how many
        self._times: dict[tuple[str, int], Times] = {}
        self._seconds: dict[str, float | None] = {}  # of each stage, once it has ended
        self._finishes: tuple[str, ...] = ()
        self._error: str | None = None

    def parts(self, parts: Sequence[Part]) -> None:
        """They have just come from the engine."""
        now, last = time.monotonic(), self._last
        for part in parts:
            text, count = (part.id, part.index), len(part.tokens)
            if part.times is not None:
                self._times[text] = part.times
            if not count:
                continue
            since = last.get(text)
            if since is not None:
                self._between.observe((now - since) / count, count)
            elif part.score is None and count > 1:
                self._between.observe(0.0, count - 1)
            last[text] = now
            self._counts[text] += count
            self._metrics.generation_tokens += count
            if self._first is None:
                self._begin(now)

    def _begin(self, now: float) -> None:
        """It has its first token."""
        self._first = now
        self._metrics.prompt_tokens += sum(self._new.prompts)
        self._metrics.histogram("time_to_first_token_seconds").observe(now - self._new.arrival)

    def ended(self, end: Ended) -> None:
        """Once, whatever happened."""
        now, error = time.monotonic(), end.error
        self._finishes = ("abort",) if end.gone else ("error",) if error is not None else end.finishes
        self._error = type(error).__name__ if error is not None and not end.gone else None
        for reason in self._finishes:
            self._metrics.count("request_success_total", reason if reason in REASONS else "error")
        if isinstance(error, QueueFullError):
            self._metrics.count("admission_rejections_total", _limit(error))
        self._seconds = self._staged(now)
        if not isinstance(error, QueueFullError | EngineUnready):
            self._observe()
        if tracer := self._watch.tracer:
            carried = {name: self._new.headers[name] for name in _CARRIED if name in self._new.headers}
            tracer.span(self._new.arrival, now, carried, self._attributes(), self._error)

    def _staged(self, now: float) -> dict[str, float | None]:
        """Seconds of each stage, as far as the engine told: of a text that this process ended it may tell nothing."""
        times, arrival = [*self._times.values()], self._new.arrival
        admitted = min([each.admitted for each in times if each.admitted is not None], default=None)
        first = min([each.first_token for each in times if each.first_token is not None], default=None)
        last = max([each.finished or now for each in times], default=now)
        return {
            "e2e": now - arrival,
            "first_token": None if self._first is None else self._first - arrival,
            "queue": None if admitted is None else admitted - arrival,
            "prefill": None if admitted is None or first is None else first - admitted,
            "decode": None if first is None else last - first,
            "inference": None if admitted is None else last - admitted,
        }

    def _observe(self) -> None:
        """Into the histograms of whole requests."""
        seconds, times, params = self._seconds, self._times.values(), self._new.params
        found = {
            "e2e_request_latency_seconds": seconds["e2e"],
            **{f"request_{name}_time_seconds": seconds[name] for name in ("queue", "prefill", "decode", "inference")},
            "request_prompt_tokens": sum(self._new.prompts),
            "request_generation_tokens": self._counts.total(),
            "request_params_n": params.n,
            "request_params_max_tokens": params.max_tokens,
            "request_time_per_output_token_seconds": self._per_token(),
        }
        if times:
            reused = {prompt: each.reused_tokens for (prompt, _), each in self._times.items()}
            found["request_prefill_kv_computed_tokens"] = sum(self._new.prompts) - sum(reused.values())
            found["request_num_preemptions"] = sum(each.preemptions for each in times)
        for name, value in found.items():
            if value is not None:
                self._metrics.histogram(name).observe(value)

    def _per_token(self) -> float | None:
        """Seconds from the first token to the last, by the tokens of the longest text less one."""
        longest = max(self._counts.values(), default=0)
        return None if self._first is None or longest < 2 else (max(self._last.values()) - self._first) / (longest - 1)

    def fields(self) -> Mapping[str, object]:
        """For the log's line."""
        seconds = {f"{name}_seconds": self._seconds.get(name) for name in ("queue", "first_token", "prefill", "decode")}
        return {
            "model": self._new.model,
            "streamed": self._new.streamed,
            "prompts": len(self._new.prompts),
            "prompt_tokens": sum(self._new.prompts),
            "generation_tokens": self._counts.total(),
            **{name: None if value is None else round(value, 6) for name, value in seconds.items()},
            "finish": ",".join(sorted(set(self._finishes))) or None,
            "error": self._error,
        }

    def _attributes(self) -> dict[str, Any]:
        """Of the span, by the names that vLLM uses."""
        params, seconds = self._new.params, self._seconds
        return {
            "gen_ai.request.id": self._new.request_id,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.n": params.n,
            "gen_ai.response.model": self._new.model,
            "gen_ai.response.finish_reasons": self._finishes,
            "gen_ai.usage.num_sequences": len(self._counts),
            "gen_ai.usage.prompt_tokens": sum(self._new.prompts),
            "gen_ai.usage.completion_tokens": self._counts.total(),
            "gen_ai.latency.time_in_queue": seconds["queue"],
            "gen_ai.latency.time_to_first_token": seconds["first_token"],
            "gen_ai.latency.time_in_model_prefill": seconds["prefill"],
            "gen_ai.latency.time_in_model_decode": seconds["decode"],
            "gen_ai.latency.time_in_model_inference": seconds["inference"],
            "gen_ai.latency.e2e": seconds["e2e"],
        }


def _limit(error: QueueFullError) -> str:
    """The limit that the message names."""
    return next((name for name in REJECTIONS if name in str(error)), REJECTIONS[0])
