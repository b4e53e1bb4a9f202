"""The engine process as the HTTP process sees it: one connection, and a reply for each request.

Everything runs in the event loop's thread. `supervisor` starts the process and tells the client what becomes of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import msgspec

from penstock import errors
from penstock.errors import ExecutorError, OptionError, PenstockError, QueueFullError
from penstock.grammar.compiled import Compiled
from penstock.grammar.guide import KEPT
from penstock.grammar.process import CACHED
from penstock.serve.link import EngineDied, EngineUnready, State
from penstock.serve.wire import (
    HEADER,
    Abort,
    Beat,
    Failed,
    Forget,
    FromEngine,
    Learn,
    Part,
    Parts,
    Progress,
    Ready,
    Submit,
    ToEngine,
    WireError,
    frame,
    length_at,
    read_from_engine,
)

MOST_WAITING: Final = 64  # parts of a reply that nobody takes, before those of a text become one
MOST_UNREAD: Final = 256 << 20  # bytes that wait for a process that does not read, before requests are refused
READ: Final = 1 << 18  # bytes of the buffer, at least


class EngineReply:
    """`link.Reply`. Parts that nobody takes become one for each text, so that they cost no more than their tokens."""

    def __init__(self, client: EngineClient, id: str, num_texts: int | None) -> None:
        """`num_texts` None: all come at once."""
        self._client, self._id = client, id
        self._left = num_texts  # texts that have not ended
        self._parts: list[Part] = []
        self._most = MOST_WAITING
        self._aborted: set[int] = set()
        self._error: PenstockError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def comes_whole(self) -> bool:
        """Whether all of its parts are in one message."""
        return self._left is None

    async def parts(self) -> list[Part]:
        while not self._parts:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        taken, self._parts, self._most = self._parts, [], MOST_WAITING
        return taken

    def abort(self, index: int | None = None) -> None:
        if index is None:
            self._client.abort(self._id, None)
            self._parts.clear()
            self._give_up()
        elif index not in self._aborted:
            self._client.abort(self._id, index)
            self._aborted.add(index)
            self._parts = [part for part in self._parts if part.index != index]
            self._end_one()
            if not self._left and not self._parts:
                self._give_up()

    def put(self, part: Part) -> None:
        """From the client: what came."""
        if part.index in self._aborted:
            return
        self._parts.append(part)
        if part.finish is not None:
            self._aborted.add(part.index)  # there is nothing left to abort
            self._end_one()
        elif len(self._parts) > self._most:
            self._parts = joined(self._parts)
            self._most = MOST_WAITING + len(self._parts)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, error: PenstockError) -> None:
        """From the client: nothing follows."""
        self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _give_up(self) -> None:
        """Nothing comes any more; a task that still waits must not do so for ever."""
        self.fail(ExecutorError(f"request {self._id} was aborted"))

    def _end_one(self) -> None:
        if self._left is None:
            self._client.forget(self._id)
            return
        self._left -= 1
        if self._left <= 0:
            self._client.forget(self._id)


def joined(parts: list[Part]) -> list[Part]:
    """One part for each text, with all its tokens, where the first of its parts is. The lists of tokens are reused."""
    found: dict[int, Part] = {}
    for part in parts:
        before = found.get(part.index)
        found[part.index] = part if before is None else _behind(before, part)
    return [*found.values()]


def _behind(before: Part, part: Part) -> Part:
    before.tokens.extend(part.tokens)
    if before.logprobs is not None and part.logprobs is not None:
        before.logprobs.extend(part.logprobs)
    return msgspec.structs.replace(
        part,
        tokens=before.tokens,
        logprobs=before.logprobs,
        prompt_logprobs=before.prompt_logprobs,
        notes=before.notes,
        times=part.times or before.times,
    )


class EngineClient:
    """`link.EngineLink`, over whatever connection it has at the moment."""

    def __init__(self) -> None:
        self.state: State = "loading"
        self.facts: Mapping[str, Any] = {}
        self.beat: Beat | None = None
        self.progress: tuple[str, int, int] = ("starting", 0, 0)
        self.restarts = 0
        self.longest_step = 0.0  # seconds that a step was seen to take, as far as beats tell
        self.refusal: Callable[[], EngineUnready] | None = None  # where no requests are taken: why
        self.opened: Callable[[], None] | None = None  # hears that the engine takes requests
        self.opening_error: Failed | None = None  # why the process has no engine
        self._replies: dict[str, EngineReply] = {}
        self._transport: asyncio.WriteTransport | None = None
        self._taught: OrderedDict[bytes, int] = OrderedDict()  # grammars that the process knows, and their bytes

    @property
    def num_open(self) -> int:
        """Requests without an end."""
        return len(self._replies)

    def submit(self, new: Submit, grammar: Compiled | None = None) -> EngineReply:
        if self.state != "ready" or self._transport is None:
            raise self.refusal() if self.refusal else EngineUnready(f"the engine is {self.state}", 1.0)
        if new.id in self._replies:
            raise OptionError(f"request id {new.id!r} is taken by a request that has not finished; choose another")
        if (unread := self._transport.get_write_buffer_size()) > MOST_UNREAD:
            raise QueueFullError(f"{unread} bytes of requests wait for the engine to read them; try again later")
        if grammar is not None:
            self._teach(grammar)
        data = frame(new)
        reply = EngineReply(self, new.id, _num_texts(new.params))
        self._replies[new.id] = reply
        self._transport.write(data)
        return reply

    def _teach(self, grammar: Compiled) -> None:
        """The process knows it from now on; the least recently used make room."""
        if grammar.key in self._taught:
            self._taught.move_to_end(grammar.key)
            return
        self.send(Learn(grammar.body))
        self._taught[grammar.key] = len(grammar.body)
        while len(self._taught) > KEPT or (len(self._taught) > 1 and sum(self._taught.values()) > CACHED):
            self.send(Forget(self._taught.popitem(last=False)[0]))

    def abort(self, id: str, index: int | None) -> None:
        """Of a request that has ended: nothing."""
        if id in self._replies:
            if index is None:
                self.forget(id)
            self.send(Abort(id, index))

    def forget(self, id: str) -> None:
        """What comes of it from now on is dropped."""
        self._replies.pop(id, None)

    def send(self, message: ToEngine) -> None:
        if self._transport is not None:
            self._transport.write(frame(message))

    def connected(self, transport: asyncio.WriteTransport) -> None:
        self._transport, self.beat, self.opening_error, self.longest_step = transport, None, None, 0.0
        self._taught.clear()

    def disconnected(self, transport: asyncio.WriteTransport | None) -> None:
        """Nothing can be written any more; what came before may still be read, and then comes `lost`."""
        if transport is self._transport:
            self._transport = None

    @property
    def is_connected(self) -> bool:
        return self._transport is not None

    def lost(self, error: EngineDied) -> None:
        """The process is gone: every request that it had ends with this."""
        self._transport = None
        replies, self._replies = self._replies, {}
        for reply in replies.values():
            reply.fail(EngineDied(str(error)))

    def take(self, message: FromEngine) -> None:
        """What the process says."""
        if isinstance(message, Parts):
            self._take_parts(message.parts)
        elif isinstance(message, Beat):
            self._take_beat(message)
        elif isinstance(message, Failed):
            self._take_failed(message)
        elif isinstance(message, Ready):
            self.facts, self.progress = message.facts, ("ready", 1, 1)
            if self.opened is not None:
                self.opened()
        elif isinstance(message, Progress):
            self.progress = message.stage, message.done, message.total

    def _take_parts(self, parts: list[Part]) -> None:
        find, whole = self._replies.get, dict[str, EngineReply]()
        for part in parts:
            reply = find(part.id) or whole.get(part.id)
            if reply is not None:
                if reply.comes_whole:
                    whole[part.id] = reply
                reply.put(part)

    def _take_beat(self, beat: Beat) -> None:
        before, self.beat = self.beat, beat
        if before is not None and before.busy and beat.steps > before.steps:
            self.longest_step = max(self.longest_step, before.time - before.stepped)

    def _take_failed(self, failed: Failed) -> None:
        if not failed.id:
            self.opening_error = failed
        elif reply := self._replies.pop(failed.id, None):
            reply.fail(error_of(failed))


def error_of(failed: Failed) -> PenstockError:
    """By its class's name."""
    kind = getattr(errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, PenstockError):
        return kind(failed.message)
    return ExecutorError(failed.message)


def _num_texts(params: Mapping[str, Any]) -> int | None:
    """How many end one by one; wrong values are refused by the engine."""
    if params.get("use_beam_search"):
        return None
    width = params.get("best_of") or params.get("n") or 1
    return width if isinstance(width, int) else 1


class Frames(asyncio.BufferedProtocol):
    """Cuts what comes into messages, without a copy, and lets the client have them."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._buffer = bytearray(READ)
        self._view = memoryview(self._buffer)
        self._end = 0  # of what has come
        self.transport: asyncio.Transport | None = None
        self.closed_at: float | None = None
        self.error: WireError | None = None  # what came that is no message

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        self._client.connected(self.transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.closed_at = time.monotonic()
        self._client.disconnected(self.transport)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def get_buffer(self, hint: int) -> memoryview:
        return self._view[self._end :]

    def buffer_updated(self, count: int) -> None:
        self._end += count
        try:
            start = self._read()
            self._move(start)
        except WireError as error:
            self.error = error
            self.close()

    def _read(self) -> int:
        """Every whole message; where the rest begins."""
        at, size = 0, HEADER.size
        while self._end - at >= size:
            end = at + size + length_at(self._view, at)
            if end > self._end:
                break
            self._client.take(read_from_engine(self._view[at + size : end]))
            at = end
        return at

    def _move(self, start: int) -> None:
        """The rest to the front, with room for all of its message."""
        rest = self._end - start
        size = length_at(self._view, start) + HEADER.size if rest >= HEADER.size else 0
        if size > len(self._buffer):
            buffer = bytearray(size + READ)
            buffer[:rest] = self._view[start : self._end]
            self._use(buffer)
        elif start and rest:
            self._view[:rest] = bytes(self._view[start : self._end])
        if not rest and len(self._buffer) > READ:  # one long message need not cost its memory for good
            self._use(bytearray(READ))
        self._end = rest

    def _use(self, buffer: bytearray) -> None:
        self._buffer, self._view = buffer, memoryview(buffer)
