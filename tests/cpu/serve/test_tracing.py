"""Spans, as a collector gets them."""

from __future__ import annotations

import builtins
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from penstock.errors import ExecutorError, OptionError
from penstock.serve.live import Live
from penstock.serve.metrics import Metrics
from penstock.serve.tracing import Tracer
from penstock.serve.watch import Watch
from penstock.serve.wire import Part, Submit, Times
from tests.cpu.serve.doubles import StillEngine

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(HTTPServer):
    """Keeps the spans that come."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Any] = []
        self.services: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        import gzip

        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.services |= {a.value.string_value for a in resource.resource.attributes}
            self.server.spans += [span for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def request(watch: Watch, error: Exception | None = None, **headers: str) -> float:
    """Arrived two seconds ago; when that was on the clock of the wall."""
    arrival = time.monotonic() - 2
    new = Submit("cmpl-1", [5, 6, 7], {"temperature": 0.5, "top_p": 0.9, "n": 2}, arrival)
    watched = watch.started("req-1", new, 4, [(name.encode(), value.encode()) for name, value in headers.items()])
    times = Times(arrival, arrival + 1, arrival + 2, arrival + 0.5)
    watched.parts([Part("cmpl-1", 0, [1, 2], "length", times=times)])
    watched.ended(error)
    return time.time() - 2


def _values(span: Any) -> dict[str, Any]:
    found = {}
    for each in span.attributes:
        kind = each.value.WhichOneof("value")
        value = getattr(each.value, kind)
        found[each.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


def test_a_request_is_a_span_below_the_callers(collector: Collector) -> None:
    tracer = Tracer(collector.url)
    watch = Watch(Metrics(Live(StillEngine()), lambda: "bundled"), tracer)
    arrived = request(watch, traceparent=f"00-{TRACE}-{PARENT}-01", tracestate="vendor=7")
    tracer.close()
    (span,) = collector.spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("llm_request", TRACE, PARENT)
    assert span.trace_state == "vendor=7"
    assert abs(span.start_time_unix_nano / 1e9 - arrived) < 0.5
    assert 2 <= (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 < 3
    assert "penstock" in collector.services
    found = _values(span)
    times = {name: found.pop(name) for name in [*found] if ".latency." in name}
    assert found == {
        "gen_ai.request.id": "cmpl-1", "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.9,
        "gen_ai.request.max_tokens": 4, "gen_ai.request.n": 2,
        "gen_ai.response.finish_reasons": ["length"], "gen_ai.usage.num_sequences": 1,
        "gen_ai.usage.prompt_tokens": 3, "gen_ai.usage.completion_tokens": 2,
    }  # fmt: skip
    assert times.pop("gen_ai.latency.time_in_queue") == pytest.approx(0.5)
    assert times.pop("gen_ai.latency.time_in_model_prefill") == pytest.approx(0.5)
    assert times.pop("gen_ai.latency.time_in_model_decode") == pytest.approx(1.0)
    assert times.pop("gen_ai.latency.time_in_model_inference") == pytest.approx(1.5)
    assert {*times} == {"gen_ai.latency.e2e", "gen_ai.latency.time_to_first_token"}


def test_errors_and_requests_of_nobodys_trace(collector: Collector) -> None:
    tracer = Tracer(collector.url)
    watch = Watch(Metrics(Live(StillEngine()), lambda: "bundled"), tracer)
    request(watch, ExecutorError("step 7 failed"), traceparent="nonsense")
    tracer.close()
    (span,) = collector.spans
    assert not span.parent_span_id
    assert (span.status.code, span.status.message) == (2, "ExecutorError")


def test_a_collector_that_is_not_there_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.serve.tracing.FLUSH", 0.3)
    tracer = Tracer("http://127.0.0.1:9/v1/traces")
    watch = Watch(Metrics(Live(StillEngine()), lambda: "bundled"), tracer)
    start = time.monotonic()
    for _ in range(100):
        request(watch)
    assert time.monotonic() - start < 1
    tracer.close()
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("url", ["localhost:4318", "grpc://host:4317", "http://", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(OptionError, match="is no URL; give one such as"):
        Tracer(url)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="opentelemetry")
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(OptionError, match=r"opentelemetry is missing.*penstock\[otel\]"):
        Tracer("http://localhost:4318/v1/traces")
