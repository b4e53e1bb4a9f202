"""One engine process as its parent holds it: started, connected, listened to, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from penstock.serve import logs
from penstock.serve.blackbox import read_box
from penstock.serve.client import EngineClient, Frames
from penstock.serve.opening import Opening

TAIL: Final = 16 << 10  # characters of what it printed that are kept
LINE: Final = 2000  # and of a line that are logged together
CLOSING: Final = 2.0  # seconds between the ends of process and connection, whichever is first


@dataclass
class Child:
    """`folder` holds its socket, its stacks and its black box. Times are seconds on the monotonic clock."""

    folder: Path
    process: asyncio.subprocess.Process
    server: asyncio.Server
    frames: Frames
    started: float = field(default_factory=time.monotonic)
    ready_at: float | None = None
    reason: str | None = None  # why it was killed
    printed: str = ""  # the end of it

    @property
    def connected(self) -> bool:
        return self.frames.transport is not None

    @property
    def broken(self) -> str | None:
        """Why no more is to be had from it, though it may run."""
        if self.frames.error is not None:
            return f"it said what is no message: {self.frames.error}"
        return "it closed its connection" if self._closed_for() > CLOSING else None

    def _closed_for(self) -> float:
        return time.monotonic() - self.frames.closed_at if self.frames.closed_at is not None else 0.0

    async def ended(self) -> int:
        """Wait until it has, and all that it said and printed has come; its exit code."""
        printing = asyncio.create_task(self._print())
        code = await self.process.wait()
        self.kill()
        with suppress(TimeoutError):
            await asyncio.wait_for(printing, CLOSING)
        end = time.monotonic() + CLOSING
        while self.connected and self.frames.closed_at is None and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self.frames.close()
        self.server.close()
        return code

    async def _print(self) -> None:
        """What it prints is for our log, line by line."""
        assert self.process.stdout is not None
        rest = ""
        while data := await self.process.stdout.read(1 << 16):
            text = data.decode(errors="replace")
            self.printed = (self.printed + text)[-TAIL:]
            *lines, rest = (rest + text).split("\n")
            self._log(*lines, *([rest] if len(rest) > LINE else []))
            rest = "" if len(rest) > LINE else rest
        self._log(rest)

    def _log(self, *lines: str) -> None:
        for line in filter(None, map(str.strip, lines)):
            logs.say("the engine says", {"pid": self.process.pid, "line": line[:LINE]})

    def kill(self) -> None:
        """With whatever it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def write_stacks(self) -> None:
        """Have it put the stacks of all its threads where `stacks` finds them."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)

    def stacks(self) -> str:
        with suppress(OSError):
            return (self.folder / "faults").read_text(errors="replace")[:TAIL]
        return ""

    def steps(self) -> list[dict[str, Any]]:
        return read_box(self.folder / "box")


async def spawn(command: Sequence[str], arguments: Mapping[str, Any], folder: Path, client: EngineClient) -> Child:
    """Start the command and give it its `Opening`. Raises OSError."""
    frames = Frames(client)
    protocols: list[asyncio.BaseProtocol] = [frames]
    socket = str(folder / "socket")
    accept = asyncio.get_running_loop().create_unix_server
    server = await accept(lambda: protocols.pop() if protocols else _Refused(), socket)
    opening = Opening(socket, str(folder / "faults"), str(folder / "box"), dict(arguments))
    pipe, merged = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
    start = asyncio.create_subprocess_exec
    try:
        process = await start(*command, stdin=pipe, stdout=pipe, stderr=merged, start_new_session=True)
    except OSError:
        server.close()
        raise
    assert process.stdin is not None
    process.stdin.write(opening.to_json())
    process.stdin.close()
    return Child(folder, process, server, frames)


class _Refused(asyncio.Protocol):
    """Whoever connects when the process has."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()
