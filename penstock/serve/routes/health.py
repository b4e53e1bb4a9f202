"""/health: 200 while steps move. It waits for nothing, so it answers while the engine hangs."""

from __future__ import annotations

import time
from typing import Final, Literal

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from penstock.serve.answers import answer
from penstock.serve.serving import Endpoint, Serving


class Health(BaseModel):
    """`state`: of the engine, or draining. progress: of opening it. `running`, `waiting`: requests.
    `seconds_since_step`: none before the first beat of an engine. warm: whether every graph is captured; before, some
    steps run padded. `restarts`: of the engine since the start."""

    status: Literal["ok", "unhealthy"]
    state: str
    reason: str
    progress: str | None
    running: int | None
    waiting: int | None
    seconds_since_step: float | None
    warm: bool
    restarts: int


async def health(request: Request, serving: Serving) -> Response:
    now, link = time.monotonic(), serving.link
    well, reason = (False, "the server is shutting down") if serving.draining else serving.healthy(now)
    beat, (stage, done, total) = link.beat, link.progress
    stats = beat.stats if beat else {}
    told = Health(
        status="ok" if well else "unhealthy",
        state="draining" if serving.draining else link.state,
        reason=reason,
        progress=None if link.state == "ready" else f"{stage} {done}" + (f" of {total}" if total else ""),
        running=stats.get("requests_running"),
        waiting=stats.get("requests_waiting"),
        seconds_since_step=max(0.0, now - beat.stepped) if beat else None,
        warm=bool(stats) and stats.get("buckets_captured") == stats.get("buckets"),
        restarts=link.restarts,
    )
    return answer(told, 200 if well else 503)


ROUTES: Final = (
    Endpoint("GET", "/health", health, "Whether it serves: 200, else 503.", gives=Health, also=((503, Health),)),
)
