"""HTTP's own limits: a request's head is bounded in bytes and in time, before an application hears of it."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from penstock.serve.answers import JSON, to_json
from penstock.serve.errors import INVALID, Refusal

MOST_BYTES: Final = 64 << 10  # of request line and headers
SECONDS: Final = 30.0  # until they have come whole


class Protocol(HttpToolsProtocol):
    """uvicorn's, with these limits; what it refuses gets the same JSON as elsewhere."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._read: int | None = 0  # bytes of the head so far; None behind it
        self._timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._read is None or self.transport.is_closing():
            return
        self._read += len(data)
        if self._read > MOST_BYTES:
            self._end(431, f"the request's head is longer than {MOST_BYTES} bytes; send fewer or shorter headers")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._read = 0
        if self._timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        self._read = None
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._end(400, "this is no HTTP/1.1 request that can be read")

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(SECONDS, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if not self.transport.is_closing():
            self._end(408, f"the request's head did not come within {SECONDS:g} s")

    def _end(self, status: int, message: str) -> None:
        """Answer by hand, where no application can, and close. An answer that is under way is cut off."""
        cycle = self.cycle
        if not self.pipeline and (cycle is None or cycle.response_complete or not cycle.response_started):
            if cycle is not None:
                cycle.disconnected = True  # nothing that it sends goes out any more
            body = to_json(Refusal(status, message, INVALID).body)
            head = f"content-type: {JSON}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.transport.close()
