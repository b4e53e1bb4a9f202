"""Server-sent events, written by hand: what is the same in all events of a request is made once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from penstock.serve.answers import to_json
from penstock.serve.app import while_connected
from penstock.serve.serving import Serving

_DONE: Final = b"data: [DONE]\n\n"
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Events:
    """Where a stream's events go. The answer starts with the first, so what fails before has a status of its own."""

    def __init__(self, send: Send) -> None:
        self._send, self.started = send, False

    async def write(self, events: bytes) -> None:
        """Whole events, one or more. Waits while the client is slow to read."""
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


class Stream(Response):
    """An answer in events that `work` writes. Its errors come as an event, once it has started."""

    def __init__(self, serving: Serving, work: Callable[[Events], Awaitable[None]]) -> None:
        self._serving, self._work = serving, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(Request(scope, receive), self._run(Events(send), scope["state"]["request_id"]))

    async def _run(self, events: Events, request_id: str) -> None:
        try:
            await self._work(events)
            await events.write(_DONE)
        except Exception as error:  # the border of a request: told to its client
            if not events.started:
                raise
            await events.write(event(self._serving.refusal(request_id, error).body))
        await events.end()


def event(data: Any) -> bytes:
    return b"data: " + to_json(data) + b"\n\n"


class Chunks:
    """The events of one answer. `common`: the fields that all of them have. usage: whether they have a place for it."""

    def __init__(self, common: dict[str, Any], field: str, usage: bool) -> None:
        """`field`: what a choice has besides index and ends: "text" or "delta"."""
        self._head = b"data: " + to_json(common)[:-1] + b',"choices":'
        self._field = b',"' + field.encode() + b'":'
        self._null = b',"usage":null}\n\n' if usage else b"}\n\n"

    def choice(
        self, index: int, value: bytes, logprobs: Any = None, finish: str | None = None,
        stop_reason: str | int | None = None, usage: Any = None,
    ) -> bytes:  # fmt: skip
        """An event with news of one text; `value` is JSON."""
        scores = b"null" if logprobs is None else to_json(logprobs)
        end = b',"finish_reason":null}]' if finish is None else _end(finish, stop_reason)
        tail = self._null if usage is None else _usage(usage)
        return b'%b[{"index":%d%b%b,"logprobs":%b%b%b' % (self._head, index, self._field, value, scores, end, tail)

    def usage(self, usage: Any) -> bytes:
        """The last event, without a choice."""
        return self._head + b"[]" + _usage(usage)


def _end(finish: str, stop_reason: str | int | None) -> bytes:
    return b',"finish_reason":"%b","stop_reason":%b}]' % (finish.encode(), to_json(stop_reason))


def _usage(usage: Any) -> bytes:
    return b',"usage":' + to_json(usage) + b"}\n\n"
