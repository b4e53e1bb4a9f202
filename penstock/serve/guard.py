"""What stands before the endpoints: request ids, the record of answers, keys, the size of bodies; all as plain ASGI."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any, Final

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.serve.errors import RequestError
from penstock.serve.serving import Answered, Serving

_SANE_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_LINGER: Final = 1.0  # seconds
OPEN: Final = frozenset({"/", "/health"})  # without a key, for reading
WATCHED: Final = frozenset({"/health", "/metrics", "/live"})  # every few seconds, until the end


class ClientGone(Exception):
    """The client went away before the end."""


class Answering:
    """The outermost: gives each request an id, turns what it raises into an answer, and tells the hooks.

    An error behind the first byte of an answer can only cut it off; whoever streams reports his own.
    """

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app, self._serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status, ended = time.monotonic(), 0, False
        request_id = _request_id(scope)
        scope.setdefault("state", {}).update(request_id=request_id, route="")

        async def tell(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            else:
                ended = not message.get("more_body", False)
            await send(message)

        gone, refused = False, None
        try:
            await self._app(scope, receive, tell)
        except (ClientGone, ClientDisconnect):
            gone = True
        except Exception as error:  # a border: whatever a request raises ends that request alone
            found = self._serving.refusal(request_id, error)
            if status:
                raise
            refused = found.code
            await found.response()(scope, receive, tell)
        finally:
            seconds, route = time.monotonic() - started, scope["state"]["route"]
            gone = gone or not ended
            record = Answered(request_id, scope["method"], route, status, started, seconds, gone, refused)
            for hook in self._serving.hooks.answered:
                hook(record)


def _request_id(scope: Scope) -> str:
    given = header(scope, b"x-request-id")
    return given.decode() if given and _SANE_ID.fullmatch(given) else uuid.uuid4().hex


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first of that name."""
    return next((value for key, value in scope["headers"] if key == name), None)


class Keys:
    """Lets through what has a key, by the very path that is routed; without one only what is open.

    Keys are compared by their hashes, in the same time wherever they differ, and all of them.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app, self._hashes = app, [_hash(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._hashes and not _is_open(scope) and not self._has_key(scope):
            raise RequestError(
                401,
                "no valid API key; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, token = (header(scope, b"authorization") or b"").partition(b" ")
        given = [token.strip()] if scheme.lower() == b"bearer" else []
        given += [key for key in (header(scope, b"x-api-key"),) if key is not None]
        found = False
        for each in given:
            hashed = _hash(each)
            for own in self._hashes:
                found |= hmac.compare_digest(hashed, own)
        return found


def _is_open(scope: Scope) -> bool:
    return scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN


def _hash(key: bytes) -> bytes:
    return sha256(key).digest()


class Sizes:
    """Ends requests whose body is too large, as soon as that is known, or too slow in coming."""

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length = header(scope, b"content-length")
        if length is not None and length.isdigit() and int(length[:20]) > self._most:
            if header(scope, b"expect") is None:
                await self._discard(receive)
            raise self._too_large(f"{int(length[:20])} bytes")
        read, whole = 0, False
        deadline = time.monotonic() + self._seconds

        async def bounded() -> Message:
            nonlocal read, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise RequestError(
                    408, f"the body did not come within {self._seconds:g} s", "body_timeout", headers=_CLOSE
                ) from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > self._most:
                await self._discard(receive)
                raise self._too_large(f"more than {self._most} bytes")
            return message

        await self._app(scope, bounded, send)

    async def _discard(self, receive: Receive) -> None:
        """Read on a while: where a connection is closed with input unread, the answer may be lost."""
        left, more = self._most, True
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while left > 0 and more:
                    message = await receive()
                    left, more = left - len(message.get("body", b"")), message.get("more_body", False)

    def _too_large(self, size: str) -> RequestError:
        said = f"the body has {size}, at most {self._most}; send less, or raise max_body_bytes"
        return RequestError(413, said, "body_too_large", headers=_CLOSE)


_CLOSE: Final = {"connection": "close"}


class Draining:
    """Refuses what is new while the server shuts down; how it is can be asked for."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app, self._serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._serving.draining and scope["type"] == "http" and scope["path"] not in WATCHED:
            raise self._serving.unready()
        await self._app(scope, receive, send)


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left. The body must have been read."""
    message: dict[str, Any] = {}
    while message.get("type") != "http.disconnect":
        message = dict(await receive())
