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
from penstock.serve.answers import answer
from penstock.serve.app import while_connected
from penstock.serve.body import read_json
from penstock.serve.config import ServeConfig
from penstock.serve.errors import RequestError
from penstock.serve.routes import ROUTES
from penstock.serve.server import open_server
from penstock.serve.serving import Endpoint, Serving
from tests.cpu.serve.doubles import ECHO, Number, StillRunner


async def slow(request: Request, serving: Serving) -> Response:
    """Sleeps for as long as it is told; ends where the client leaves, or the engine is stopped."""
    asked = await read_json(request, Number)
    print("started", flush=True)
    stopped = serving.link.stopped  # type: ignore[attr-defined]
    try:
        await while_connected(request, asyncio.wait_for(stopped.wait(), asked.number))
    except TimeoutError:
        return answer({"slept": asked.number})
    finally:
        print("ended", flush=True)
    raise RequestError(503, "the engine was stopped")


def main() -> int:
    given: dict[str, Any] = json.loads(sys.argv[1])
    runner = StillRunner(opens_in=given.pop("opens_in", 0.0))
    runner.fails = ModelError("no such model") if given.pop("fails", False) else None
    paths = {name: Path(given[name]) for name in ("ssl_certfile", "ssl_keyfile") if name in given}
    keys = {"api_keys": tuple(given.get("api_keys", ()))}
    routes = (*ROUTES, ECHO, Endpoint("POST", "/slow", slow, "Sleep.", Number))
    one = open_server(ServeConfig(**{**given, **paths, **keys}), runner, routes)
    print(one.port, flush=True)
    in_order = one.run(lambda: print("ready", flush=True), lambda *what: print(*what, file=sys.stderr, flush=True))
    print("torch" if "torch" in sys.modules else "light", flush=True)
    return 0 if in_order else 130


if __name__ == "__main__":
    sys.exit(main())
