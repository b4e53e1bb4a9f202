"""Asking an application on ASGI, and reading what it streams."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx

from penstock.grammar.compiled import Compiled
from penstock.serve.app import Application, create_app
from penstock.serve.config import ServeConfig
from penstock.serve.link import Reply
from penstock.serve.routes import ROUTES
from penstock.serve.wire import Submit
from tests.cpu.serve.doubles import client_of
from tests.cpu.serve.real import Noted, RealEngine

Ask = Callable[..., Awaitable[httpx.Response]]


def app_on(engine: RealEngine, **config: Any) -> tuple[Application, Noted]:
    noted = Noted(engine.supervisor)
    app = create_app(ServeConfig(**config), noted, ROUTES)
    app.serving._grammars = engine.grammars
    return app, noted


def asking(engine: RealEngine, work: Callable[[Ask], Awaitable[Any]], **config: Any) -> Any:
    """What `work` gives, called with a function that posts."""

    async def run() -> Any:
        app, _ = app_on(engine, **config)
        async with client_of(app) as client:

            async def ask(path: str, **body: Any) -> httpx.Response:
                found: httpx.Response = await client.post(f"/v1/{path}", json=body, timeout=60)
                return found

            return await work(ask)

    return engine.run(run)


def ask_once(engine: RealEngine, path: str, **body: Any) -> httpx.Response:
    async def work(ask: Ask) -> httpx.Response:
        return await ask(path, **body)

    found: httpx.Response = asking(engine, work)
    return found


def answer_of(engine: RealEngine, path: str, **body: Any) -> dict[str, Any]:
    response = ask_once(engine, path, **body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def events_of(text: str) -> list[dict[str, Any]]:
    """Of a stream that ended well."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def streamed(engine: RealEngine, path: str, **body: Any) -> list[dict[str, Any]]:
    response = ask_once(engine, path, stream=True, **body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


class Told(Noted):
    """An engine whose replies, or refusals, are written down."""

    def __init__(self, engine: RealEngine, replies: Sequence[Any]) -> None:
        super().__init__(engine.supervisor)
        self.replies = [*replies]

    def submit(self, new: Submit, grammar: Compiled | None = None) -> Reply:
        self.submitted.append(new)
        reply: Any = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        found: Reply = reply
        return found


def told(engine: RealEngine, path: str, replies: Sequence[Any], body: dict[str, Any], **config: Any) -> httpx.Response:
    """What is made of an engine's replies."""

    async def run() -> httpx.Response:
        app, _ = app_on(engine, **config)
        app.serving.link = Told(engine, replies)
        async with client_of(app) as client:
            found: httpx.Response = await client.post(f"/v1/{path}", json=body)
            return found

    return engine.run(run)
