"""The server's application: a table of endpoints behind its guards."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.serve.config import ServeConfig
from penstock.serve.errors import RequestError, bounded
from penstock.serve.guard import Answering, ClientGone, Draining, Keys, Sizes, until_gone
from penstock.serve.link import EngineLink
from penstock.serve.serving import Endpoint, Hooks, Serving

T = TypeVar("T")


def create_app(
    config: ServeConfig,
    link: EngineLink,
    routes: Sequence[Endpoint],
    hooks: Hooks | None = None,
    healthy: Callable[[float], tuple[bool, str]] | None = None,
) -> Application:
    """An application of ASGI. `routes`: the endpoints, those of a path side by side. What they share is its
    `serving`."""
    by_state = healthy or (lambda now: (link.state == "ready", f"the engine is {link.state}"))
    return Application(Serving(config, link, hooks or Hooks(), tuple(routes), by_state))


class Application:
    """As `create_app`."""

    def __init__(self, serving: Serving) -> None:
        self.serving, config = serving, serving.config
        app: ASGIApp = Router(_paths(serving), redirect_slashes=False, default=_unknown)
        app = Draining(app, serving)
        app = Sizes(app, config.max_body_bytes, config.body_timeout)
        app = Keys(app, config.api_keys)
        app = Answering(app, serving)
        if config.cors_origins:  # outside of the keys: a browser asks without one first
            methods, headers = ("GET", "POST"), ("authorization", "content-type", "x-api-key", "x-request-id")
            app = CORSMiddleware(
                app, config.cors_origins, methods, headers, expose_headers=("x-request-id", "retry-after")
            )
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _paths(serving: Serving) -> list[Route]:
    by_path: dict[str, dict[str, Endpoint]] = defaultdict(dict)
    for endpoint in serving.routes:
        assert endpoint.method not in by_path[endpoint.path], (endpoint.method, endpoint.path)
        by_path[endpoint.path][endpoint.method] = endpoint
    # The exact ones first: of those with a parameter none may hide them.
    ordered = sorted(by_path, key=lambda path: "{" in path)
    return [Route(path, _Path(path, by_path[path], serving)) for path in ordered]


class _Path:
    """The methods of one path."""

    def __init__(self, path: str, methods: dict[str, Endpoint], serving: Serving) -> None:
        self._path, self._methods, self._serving = path, methods, serving
        self._allowed = [*methods, *(["HEAD"] if "GET" in methods else [])]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["route"] = self._path
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in self._methods:
            allowed = ", ".join(self._allowed)
            raise RequestError(
                405,
                f"{bounded(scope['method'], 40)} is no method of {self._path}; use {allowed}",
                "method_not_allowed",
                headers={"allow": allowed},
            )
        request = Request(scope, receive)
        response = await self._methods[method].handler(request, self._serving)
        await response(scope, receive, send)


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        path = bounded(scope["path"], 100)
        raise RequestError(404, f"there is no path {path!r}; /openapi.json lists those there are", "not_found")
    raise RequestError(404, "there is no such path")


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives; it is cancelled, and ClientGone raised, where the client leaves first.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
