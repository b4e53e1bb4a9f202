"""GET /metrics."""

from __future__ import annotations

from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from penstock.serve.metrics import Metrics
from penstock.serve.serving import Endpoint, Serving


def endpoints(metrics: Metrics) -> tuple[Endpoint, ...]:
    """What Prometheus reads, in its text format or OpenMetrics', as it asks for."""

    async def read(request: Request, serving: Serving) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"content-type": kind})

    return (Endpoint("GET", "/metrics", read, "Metrics for Prometheus.", gives="text/plain"),)
