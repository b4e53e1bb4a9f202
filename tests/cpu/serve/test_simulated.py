"""The simulated engine and the clients of the load tests, without a server between them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import bundled
from penstock.serve.wire import HEADER, Abort, Beat, Part, Parts, Ready, Stop, Submit, frame, read_from_engine
from penstock.text import Tokenizer
from tests.cpu.serve.simulated import Clock, words

ROOT = Path(__file__).resolve().parents[3]


class Line:
    """The other end of the engine's socket."""

    def __init__(self, at: socket.socket) -> None:
        self._at = at

    def send(self, message: Any) -> None:
        self._at.sendall(frame(message))

    def read(self) -> Any:
        size = HEADER.unpack(self._at.recv(HEADER.size, socket.MSG_WAITALL))[0]
        return read_from_engine(self._at.recv(size, socket.MSG_WAITALL))

    def parts(self, count: int) -> list[Part]:
        """At least so many, in order."""
        found: list[Part] = []
        while len(found) < count:
            if isinstance(message := self.read(), Parts):
                found += message.parts
        return found


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        command = [sys.executable, "-m", "tests.cpu.serve.simulated", "0.02"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)
        assert process.stdin is not None
        with process.stdin as told:
            told.write(json.dumps({"socket": str(path)}).encode())
        server.settimeout(20)
        at, _ = server.accept()
        at.settimeout(20)
        try:
            with at:
                yield Line(at)
                at.sendall(frame(Stop()))
                assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()


def test_words_say_when_they_were_written() -> None:
    clock, codes = Clock(), list(words().values())
    assert len(codes) == 2048 == len(set(codes))
    tokenizer = Tokenizer.from_dir(bundled.target())
    assert tokenizer.decode(codes).split() == [*words()]
    for now in (0.0, 12345.678, 9e6):
        low, high = (codes.index(token) for token in clock.begin(now))
        at = clock.read_begin(low, high, now + 3000)
        assert at == int(now * 1e3)
        for later in (0.0, 0.025, 1.9):
            assert clock.read_on(at, codes.index(clock.go_on(now + later))) == int((now + later) * 1e3)


def test_a_token_each_step_until_the_end_or_an_abort(line: Line) -> None:
    ready = line.read()
    assert isinstance(ready, Ready) and Path(ready.facts["directory"]).is_dir()
    start = time.monotonic()
    line.send(Submit("a", [1, 2], {"max_tokens": 6}, start))
    line.send(Submit("b", [1], {"max_tokens": 1000, "n": 2}, start))
    found = line.parts(15)
    own = [part for part in found if part.id == "a"]
    assert sum(len(part.tokens) for part in own) == 6 and own[-1].finish == "length" and len(own[0].tokens) == 2
    assert own[-1].times is not None and own[-1].times.arrival == start
    assert time.monotonic() - start > 4 * 0.02
    assert {part.index for part in found if part.id == "b"} == {0, 1}
    line.send(Abort("b", 0))
    beats = [line.read() for _ in range(60)]
    last = [message for message in beats if isinstance(message, Beat)][-1]
    assert last.stats == {"requests_running": 1, "aborted": 1} and last.busy


def test_what_is_not_read_waits_and_comes_as_one_part(line: Line) -> None:
    for i in range(300):
        line.send(Submit(str(i), [1], {"max_tokens": 1000}, 0.0))
    time.sleep(1.5)  # what the socket holds is full before
    sizes = [len(part.tokens) for part in line.parts(22_000)]
    assert max(sizes) > 5, "tokens of a backlog go together"
