"""GET /metrics."""

from __future__ import annotations

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from penstock.serve.metrics import Metrics
from penstock.serve.serving import Endpoint, Serving


def endpoints(metrics: Metrics) -> tuple[Endpoint, ...]:
    """What Prometheus reads, always in its text format: in others the library writes another name for a:b."""

    async def read(request: Request, serving: Serving) -> Response:
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    return (Endpoint("GET", "/metrics", read, "Metrics for Prometheus.", gives="text/plain"),)
