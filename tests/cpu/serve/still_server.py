"""A real server around an engine that is none: `python -m tests.cpu.serve.still_server '{"port": 0, ...}'`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from penstock.errors import ModelError
from penstock.serve import protocol
from penstock.serve.answers import answer
from penstock.serve.app import while_connected
from penstock.serve.body import read_json
from penstock.serve.config import ServeConfig
from penstock.serve.errors import RequestError
from penstock.serve.routes import ROUTES
from penstock.serve.server import open_server
from penstock.serve.serving import Endpoint, Serving
from penstock.serve.sse import Events, Stream
from tests.cpu.serve.doubles import ECHO, Number, StillRunner

GIVEN: dict[str, Any] = json.loads(sys.argv[1])
RUNNER = StillRunner(GIVEN.pop("opens_in", 0.0), ModelError("no such model") if GIVEN.pop("fails", False) else None)


if "head_seconds" in GIVEN:
    protocol.SECONDS = GIVEN.pop("head_seconds")


async def slow(request: Request, serving: Serving) -> Response:
    """Sleeps for as long as it is told; ends where the client leaves, or the engine is stopped."""
    asked = await read_json(request, Number)
    print("started", flush=True)
    try:
        await while_connected(request, asyncio.wait_for(RUNNER.stopped.wait(), asked.number))
    except TimeoutError:
        return answer({"slept": asked.number})
    finally:
        print("ended", flush=True)
    raise RequestError(503, "the engine was stopped")


async def flood(request: Request, serving: Serving) -> Response:
    """Writes for as long as it is read."""
    await read_json(request, Number)

    async def write(events: Events) -> None:
        try:
            while True:
                await events.write(b"data: " + bytes(1 << 14).hex().encode() + b"\n\n")
                await asyncio.sleep(0)
        finally:
            print("left", flush=True)

    return Stream(serving, write)


async def large(request: Request, serving: Serving) -> Response:
    return Response(bytes(32 << 20))


def main() -> int:
    paths = {name: Path(GIVEN[name]) for name in ("ssl_certfile", "ssl_keyfile") if name in GIVEN}
    keys = {"api_keys": tuple(GIVEN.get("api_keys", ()))}
    own = (
        Endpoint("POST", "/slow", slow, "Sleep.", Number),
        Endpoint("POST", "/flood", flood, "Write.", Number),
        Endpoint("GET", "/large", large, "Be long."),
    )
    one = open_server(ServeConfig(**{**GIVEN, **paths, **keys}), RUNNER, (*ROUTES, ECHO, *own))
    print(one.port, flush=True)
    in_order = one.run(lambda: print("ready", flush=True), lambda *what: print(*what, file=sys.stderr, flush=True))
    print("torch" if "torch" in sys.modules else "light", flush=True)
    return 0 if in_order else 130


if __name__ == "__main__":
    sys.exit(main())
