"""Compiling grammars in processes of their own, with a limit of time and memory, for whoever asks."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from penstock.errors import PenstockError, QueueFullError, SamplingError
from penstock.grammar.compiled import Compiled
from penstock.grammar.guided import GuidedDecoding
from penstock.grammar.vocabulary import Vocabulary
from penstock.grammar.worker import DONE, receive, send, write_vocabulary

SECONDS: Final = 5.0
MEMORY: Final = 1 << 30
AT_ONCE: Final = 4
MOST_WAITING: Final = 64
CACHED: Final = 256 << 20  # bytes
_START_SECONDS: Final = 60.0
_REFUSAL: Final = 256  # bytes that a kept refusal counts as, beside its text


class Compiler:
    """Any thread may ask. The process is started by the first request, and again where it has died."""

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        seconds: float = SECONDS,
        memory: int = MEMORY,
        at_once: int = AT_ONCE,
    ) -> None:
        """`vocabulary` is asked once. seconds, memory: what one grammar may take, in bytes beyond what is there."""
        self._vocabulary, self._seconds, self._memory = vocabulary, seconds, memory
        self._lock = threading.Lock()  # of the cache and the count
        self._starting = threading.Lock()  # of the process, which takes seconds to start
        self._turn = threading.Semaphore(at_once)
        self._waiting = 0
        self._cache: OrderedDict[tuple[str, str], Compiled | str] = OrderedDict()
        self._cached = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def compile(self, guided: GuidedDecoding) -> Compiled:
        """For `guide.Grammars`. Raises SamplingError where it cannot be had, QueueFullError where too many
        wait."""
        if (known := self.cached(guided)) is not None:
            return known
        key = guided.kind, guided.text
        found = self._in_turn(key)
        self._keep(key, found)
        return _given(key, found)

    def cached(self, guided: GuidedDecoding) -> Compiled | None:
        """At once, if it was compiled already; a refusal that is known is raised."""
        key = guided.kind, guided.text
        with self._lock:
            found = self._cache.get(key)
            if found is None:
                return None
            self._cache.move_to_end(key)
        return _given(key, found)

    def close(self) -> None:
        """End the process; what still compiles ends by its limits."""
        self._closed = True
        with self._starting:
            self._end()

    def _in_turn(self, key: tuple[str, str]) -> Compiled | str:
        with self._lock:
            if self._waiting >= MOST_WAITING:
                raise QueueFullError(f"{self._waiting} grammars wait to be compiled already; try again later")
            self._waiting += 1
        try:
            with self._turn:
                return self._asked(key)
        finally:
            with self._lock:
                self._waiting -= 1

    def _asked(self, key: tuple[str, str]) -> Compiled | str:
        """The compiled grammar, or why there is none; once more where the process ended, not the fork."""
        process = self._process
        try:
            return self._once(key)
        except SamplingError:
            if process is None or not _has_ended(process):
                raise
        return self._once(key)

    def _once(self, key: tuple[str, str]) -> Compiled | str:
        mine, its = socket.socketpair()
        with mine:
            with its:
                self._hand_over(its)
            process = self._process
            mine.settimeout(self._seconds + 2)  # the fork ends itself in time
            try:
                send(mine, json.dumps([*key, self._seconds, self._memory]).encode())
                body = receive(mine)
            except (EOFError, OSError) as error:  # not kept: it may be the machine's fault
                if isinstance(error, TimeoutError):  # the process hangs, or the fork would have ended
                    self._end_hung(process)
                raise SamplingError(
                    f"guided_decoding: compiling the {key[0]} took over {self._seconds:g} s or "
                    f"{self._memory >> 20} MiB, or failed; make it smaller"
                ) from error
        return Compiled(body[1:]) if body[:1] == DONE else body[1:].decode()

    def _hand_over(self, its: socket.socket) -> None:
        """Give a socket to the process, started if it is not there; once more where it has died since."""
        with self._starting:
            for _ in range(2):
                control = self._control or self._start()
                with contextlib.suppress(OSError):
                    socket.send_fds(control, [b"."], [its.fileno()])
                    return
                self._end()
        raise SamplingError("the process that compiles grammars ends as soon as it starts; see its output")

    def _start(self) -> socket.socket:
        """Raises SamplingError where there is no xgrammar."""
        if self._closed:
            raise PenstockError("the compiler of grammars was closed; open it again")
        vocabulary = write_vocabulary(self._vocabulary())
        control, its = socket.socketpair()
        with its:
            fd = its.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "penstock.grammar.worker", str(fd)],
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                process_group=0,  # a Ctrl-C is its parent's, which ends it
            )
        control.settimeout(_START_SECONDS)
        self._control = control
        try:
            send(control, vocabulary)
            answer = receive(control)
        except (EOFError, OSError) as error:
            self._end()
            raise SamplingError(f"the process that compiles grammars did not start: {error!r}") from error
        if answer[:1] != DONE:
            self._end()
            raise SamplingError(answer[1:].decode())
        return control

    def _end_hung(self, process: subprocess.Popen[bytes] | None) -> None:
        """Whoever is next starts another."""
        with self._starting:
            if self._process is process:
                self._end()

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None

    def _keep(self, key: tuple[str, str], found: Compiled | str) -> None:
        """The least recently used make room."""
        with self._lock:
            if key not in self._cache:
                self._cache[key] = found
                self._cached += _size(key, found)
            while self._cached > CACHED:
                old, gone = self._cache.popitem(last=False)
                self._cached -= _size(old, gone)


def _given(key: tuple[str, str], found: Compiled | str) -> Compiled:
    if isinstance(found, str):
        raise SamplingError(f"guided_decoding: {key[0]} cannot be used: {found}")
    return found


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Its sockets close a moment before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.1)
    return process.returncode is not None


def _size(key: tuple[str, str], found: Compiled | str) -> int:
    return len(key[1]) + len(found if isinstance(found, str) else found.body) + _REFUSAL
