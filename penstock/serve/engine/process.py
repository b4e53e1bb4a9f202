"""The threads of the engine process: one reads requests, one writes what became of them, one tells that all is well."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

from penstock import LLM
from penstock.errors import ExecutorError, SamplingError
from penstock.runtime.executor import Executor
from penstock.runtime.loop import Loop
from penstock.serve.blackbox import BlackBox
from penstock.serve.engine.desk import Desk
from penstock.serve.engine.facts import facts_of
from penstock.serve.opening import Opening
from penstock.serve.wire import (
    HEADER,
    Abort,
    Beat,
    Failed,
    FromEngine,
    Part,
    Parts,
    Progress,
    Ready,
    Stop,
    Submit,
    WireError,
    frame,
    length_at,
    read_to_engine,
)

BEAT: Final = 0.25  # seconds
MOST_FAILURES: Final = 5  # steps in a row, none of which gave tokens
PAUSE: Final = 1e-4  # seconds between two requests of a burst, in which steps that run may go on
PR_SET_PDEATHSIG: Final = 1  # of Linux
ORPHANED, BROKEN = 3, 4  # exit codes: the connection ended; what came is no message, or the executor has failed


class Process:
    """Everything that the main thread does is to wait; the executor has a thread of its own."""

    def __init__(self, opening: Opening) -> None:
        """Connects, and listens from now on: whoever started the process may be gone before the engine is open."""
        self._opening = opening
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(opening.socket)
        self._sending = threading.Lock()
        self._stopping, self._written = threading.Event(), threading.Event()
        self._desk: Desk | None = None
        self._stats: dict[str, Any] = {}
        self._stats_of = -1, True  # the move that they are from, and whether there was work
        self._asked = False  # for newer ones
        _start(self._read)

    def run(self) -> None:
        """To the end. Raises what LLM raises; the other process has been told."""
        try:
            llm = LLM(**self._opening.arguments, progress=self._progress)
        except Exception as error:
            self._send(Failed("", type(error).__name__, str(error)))
            raise
        desk = self._open(llm)
        self._stopping.wait()
        llm.shutdown()  # which ends what runs with an error
        desk.close()
        self._written.wait()

    def _open(self, llm: LLM) -> Desk:
        executor = llm._loop.executor
        executor.recorder = BlackBox(Path(self._opening.box), executor.scheduler.limits.max_batch_size).record
        desk = Desk(llm._loop)
        self._desk = desk
        _end_with_parent()
        self._send(Ready(facts_of(llm, self._opening.arguments)))
        _start(lambda: self._write_all(desk))
        _start(lambda: self._beat_all(llm, desk))
        if llm.engine.model_spec.head:
            _start(lambda: _warm(executor))
        return desk

    def _progress(self, stage: str, done: int, total: int) -> None:
        self._send(Progress(stage, done, total))

    def _send(self, message: FromEngine) -> None:
        data = frame(message)
        with self._sending:
            self._socket.sendall(data)

    def _read(self) -> None:
        stream = self._socket.makefile("rb", buffering=1 << 18)
        try:
            while head := stream.read(HEADER.size):
                self._take(stream.read(length_at(head)))
        except WireError as error:
            _die(BROKEN, str(error))
        except OSError:
            pass  # as if it had ended
        if not self._stopping.is_set():
            _die(ORPHANED, "the process that it belongs to is gone")

    def _take(self, body: bytes) -> None:
        message = read_to_engine(body)
        if isinstance(message, Stop):
            self._stopping.set()
            if self._desk is None:
                _die(0, "stopped before the engine was open")
        elif self._desk is None:
            raise WireError(f"{type(message).__name__} came before the engine was ready; wait for Ready")
        elif isinstance(message, Submit):
            self._desk.submit(message)
            if self._desk.busy:
                time.sleep(PAUSE)
        elif isinstance(message, Abort):
            self._desk.abort(message)
        else:
            self._desk.learn(message)

    def _write_all(self, desk: Desk) -> None:
        with suppress(OSError):  # the reader sees to it
            while not desk.closed:
                self._write(*desk.wait())
        self._written.set()

    def _write(self, parts: list[Part], failed: list[Failed]) -> None:
        if parts:
            self._write_parts(parts)
        for each in failed:
            self._send(each)

    def _write_parts(self, parts: list[Part]) -> None:
        """As one message, unless that is too long."""
        try:
            self._send(Parts(parts))
        except WireError as error:
            if len(parts) > 1:
                half = len(parts) // 2
                self._write_parts(parts[:half])
                self._write_parts(parts[half:])
            elif self._desk:
                self._desk.abort(Abort(parts[0].id))
                self._send(Failed(parts[0].id, ExecutorError.__name__, f"the output has {error}; ask for less"))

    def _beat_all(self, llm: LLM, desk: Desk) -> None:
        loop = llm._loop
        with suppress(OSError):  # as above
            while not self._stopping.is_set():
                if (why := _useless(loop)) and not self._stopping.is_set():
                    time.sleep(BEAT)  # for the errors of the requests that it took along
                    _die(BROKEN, why)
                self._ask(llm)
                moves = loop.executor.num_moves
                self._send(Beat(time.monotonic(), moves, desk.moved_at, desk.busy, self._stats))
                self._stopping.wait(BEAT)

    def _ask(self, llm: LLM) -> None:
        """Have the counters taken where they are counted; whatever is there by then goes with the next beat."""
        executor, stats = llm._loop.executor, self._stats
        is_warm = stats.get("buckets_captured") == stats.get("buckets")  # else idle moments go on capturing
        if self._asked or (is_warm and self._stats_of == (executor.num_moves, False) and not executor.busy):
            return

        def take() -> None:
            self._asked = False
            self._stats_of, self._stats = (executor.num_moves, executor.busy), executor.snapshot()

        def failed(error: Exception) -> None:
            print(f"no counters: {error}", file=sys.stderr)

        self._asked = True
        with suppress(ExecutorError):  # it ends
            llm._loop.post(take, failed)


def _warm(executor: Executor) -> None:
    with suppress(SamplingError):  # there are no grammars; whoever asks for one is told why
        executor.warm()


def _end_with_parent() -> None:
    """Should this process hang where no thread of it gets on, nobody would see that the connection has ended. Not
    while it builds, which starts processes of its own."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _start(work: Callable[[], None]) -> None:
    def run() -> None:
        try:
            work()
        except Exception as error:  # the thread's border: the others cannot do without it
            _die(BROKEN, f"{type(error).__name__}: {error}")

    threading.Thread(target=run, daemon=True).start()


def _useless(loop: Loop) -> str | None:
    """Why no request can be served any more: a device that has failed once for good fails every step."""
    if loop.failure is not None:
        return str(loop.failure)
    failures = loop.executor.num_failures
    return f"{failures} steps have failed, one after another" if failures >= MOST_FAILURES else None


def _die(code: int, reason: str) -> NoReturn:
    """End at once, with the processes that a build may have started: no thread is waited for, nothing is cleared up."""
    with suppress(OSError):  # whoever read it is gone
        print(f"the engine process ends: {reason}", file=sys.stderr, flush=True)
    if code == ORPHANED and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(code)
