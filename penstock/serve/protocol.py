"""HTTP's own limits: a request's head is bounded in bytes and in time, before an application hears of it."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from penstock.serve.answers import JSON, to_json
from penstock.serve.errors import INVALID, Refusal

MOST_BYTES: Final = 64 << 10  # of request line and headers
SECONDS = 30.0  # until they have come whole, and a body whose request has its answer already
WRITE_SECONDS: Final = 120.0


class Protocol(HttpToolsProtocol):
    """uvicorn's, with these limits; what it refuses gets the same JSON as elsewhere.

    A client that reads nothing is left: its connection is cut off, as if it had gone away.
    """

    def __init__(self, *args: Any, write_timeout: float = WRITE_SECONDS, **kwargs: Any) -> None:
        """write_timeout: seconds that what is to be sent may wait, once there is more than the connection holds, or
        nothing else is left to do with it."""
        super().__init__(*args, **kwargs)
        self._read: int | None = 0  # bytes of the head so far; None behind it
        self._timer: TimerHandle | None = None
        self._write_timeout = write_timeout
        self._unread: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_unread()
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

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_unread()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and self._timer is None:
            self._timer = self.loop.call_later(SECONDS, self.transport.close)
        self._closing()

    def shutdown(self) -> None:
        super().shutdown()
        self._closing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._closing()

    def _closing(self) -> None:
        """A connection that is closed still waits for what it has to send."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._start_unread()

    def _start_unread(self) -> None:
        if self._unread is None:
            self._unread = self.loop.call_later(self._write_timeout, self.transport.abort)

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop_timer()

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
        self._closing()
