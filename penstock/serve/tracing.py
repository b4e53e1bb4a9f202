"""Spans of requests for OpenTelemetry, an extra: sent by a thread of the exporter's, in batches, never by the loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from penstock.errors import OptionError
from penstock.version import __version__

SPAN = "llm_request"
FLUSH = 5.0  # seconds that the last spans have at the end


class Tracer:
    """Sends spans to an OTLP collector by HTTP, protobuf."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint`: the whole URL, such as http://localhost:4318/v1/traces. Raises OptionError for one that is none,
        and where OpenTelemetry is not installed."""
        if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname:
            raise OptionError(
                f"otlp_traces_endpoint={endpoint!r} is no URL; give one such as http://localhost:4318/v1/traces"
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise OptionError(
                f"otlp_traces_endpoint={endpoint!r} needs OpenTelemetry ({error.name} is missing); "
                "install penstock[otel], or leave the option out"
            ) from error
        resource = Resource.create({SERVICE_NAME: "penstock", SERVICE_VERSION: __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("penstock.serve", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def span(
        self, started: float, ended: float, headers: Mapping[str, str], attributes: Mapping[str, Any], error: str | None
    ) -> None:
        """A request that ended; times of the monotonic clock. `headers`: traceparent and tracestate, if they came.
        `error`: the kind of what it ended with."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        since = time.time_ns() - int(time.monotonic() * 1e9)
        span = self._tracer.start_span(
            SPAN,
            self._propagator.extract(headers),
            SpanKind.SERVER,
            {name: value for name, value in attributes.items() if value is not None},
            start_time=since + int(started * 1e9),
        )
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(since + int(ended * 1e9))

    def close(self) -> None:
        """Send what is left; waits up to FLUSH seconds."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(FLUSH)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # tries no more
