"""A tiny OpenAI server whose latencies are known, and which can be broken in many ways; in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Fake:
    """`first`, `gap`: seconds before the first token, and between two. `per_chunk`: tokens in each. `way`: how it is
    broken: "500", "cut", "not json", "hang", "no stream", "error", "silent"; by the request's number where a dict."""

    first: float = 0.1
    gap: float = 0.02
    per_chunk: int = 1
    usage: bool = True
    takes_ids: int = 1 << 30  # the largest id; 0: text alone
    key: str = ""
    way: str | dict[int, str] = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    now: int = 0
    peak: int = 0
    url: str = ""

    async def models(self, request: web.Request) -> web.Response:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return _error(401, "wrong key")
        return web.json_response({"data": [{"id": "fake-model"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        refused = self._refusal(request, body)
        number = len(self.bodies)
        self.bodies.append(body)
        way = self.way if isinstance(self.way, str) else self.way.get(number, "")
        if refused or way == "500":
            return refused or _error(500, "the engine is on fire")
        if way == "no stream":
            return web.json_response({"choices": [{"text": "all at once"}]})
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            return await self._stream(request, body, way)
        finally:
            self.now -= 1

    def _refusal(self, request: web.Request, body: dict[str, Any]) -> web.Response | None:
        prompt = body.get("prompt", "")
        if isinstance(prompt, list) and max(prompt) > self.takes_ids:
            return _error(400, f"token id {max(prompt)} is outside the vocabulary")
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return _error(401, "wrong key")
        return None

    async def _stream(self, request: web.Request, body: dict[str, Any], way: str) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        chat = "messages" in body
        if chat:
            await _event(answer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        if way == "silent":
            await answer.write(b"data: [DONE]\n\n")
            return answer
        count = body.get("max_tokens") or body.get("max_completion_tokens")
        await asyncio.sleep(self.first)
        for i in range(0, count, self.per_chunk):
            if i:
                await asyncio.sleep(self.gap)
            if i >= 2 and way == "cut":
                assert request.transport is not None
                request.transport.abort()
                return answer
            if i >= 2 and way == "hang":
                while request.transport and not request.transport.is_closing():
                    await asyncio.sleep(0.05)
            if i >= 2 and way in ("not json", "error"):
                await answer.write(
                    b"data: {oops\n\n" if way == "not json" else b'data: {"error": {"message": "x"}}\n\n'
                )
            last = i + self.per_chunk >= count
            said = {"delta": {"content": "a"}} if chat else {"text": "a"}
            await _event(answer, {"choices": [{"index": 0, **said, "finish_reason": "length" if last else None}]})
        if self.usage:
            size = len(body.get("prompt") or body["messages"][0]["content"].split())
            await _event(answer, {"choices": [], "usage": {"prompt_tokens": size, "completion_tokens": count}})
        await answer.write(b"data: [DONE]\n\n")
        return answer


async def _event(answer: web.StreamResponse, data: dict[str, Any]) -> None:
    await answer.write(b"data: " + json.dumps(data).encode() + b"\n\n")


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """Runs it; `fake.url` is where."""
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def main() -> None:
        app = web.Application()
        app.add_routes([web.get("/v1/models", fake.models), web.post("/v1/completions", fake.complete),
                        web.post("/v1/chat/completions", fake.complete)])  # fmt: skip
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await done.wait()
        await runner.cleanup()

    done = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    assert ready.wait(10)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.close()
