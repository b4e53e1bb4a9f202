"""The supervisor over processes that only pretend: how they fail, how often they are started, what is kept of them."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import CheckpointError, ExecutorError, OptionError
from penstock.serve import child, crash
from penstock.serve.blackbox import read_box
from penstock.serve.client import EngineClient, Frames, joined
from penstock.serve.link import EngineDied, EngineUnready
from penstock.serve.logs import TextLines
from penstock.serve.supervisor import Supervisor
from penstock.serve.wire import Beat, Failed, FromEngine, Part, Parts, Progress, Submit, frame

PRETEND = """
import socket, sys, time
from penstock.serve.opening import read_opening
from penstock.serve.wire import *
opening = read_opening(sys.stdin.buffer.read())
link = socket.socket(socket.AF_UNIX)
def connect():
    link.connect(opening.socket)
def send(message):
    link.sendall(frame(message))
def beat(**more):
    now = time.monotonic()
    send(Beat(**{"time": now, "steps": 0, "stepped": now, "busy": False, "stats": {}} | more))
"""


def pretending(tmp_path: Path, source: str, **more: Any) -> Supervisor:
    command = [sys.executable, "-c", PRETEND + source]
    return Supervisor({"model": "m"}, command=command, crash_dir=tmp_path / "crashes", **{"first_backoff": 0.01} | more)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


async def until(true: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.01)


def test_a_mistake_is_kept_and_not_tried_again(tmp_path: Path) -> None:
    async def opening() -> None:
        supervisor = pretending(tmp_path, "connect(); send(Failed('', 'CheckpointError', 'a tensor is missing'))")
        supervisor.start()
        with pytest.raises(CheckpointError, match="a tensor is missing"):
            await supervisor.ready()
        assert (supervisor.link.state, supervisor.link.restarts) == ("stopped", 0)
        with pytest.raises(EngineUnready):
            supervisor.link.submit(Submit("a", [1]))
        await supervisor.stop()
        assert not (tmp_path / "crashes").exists()

    run(opening())


@pytest.mark.parametrize(
    "source, reason",
    [
        ("sys.exit(7)", "exit code 7"),
        ("connect(); send(Failed('', 'RuntimeError', 'no device'))", "no device"),
        ("connect(); link.sendall(b'GET / HTTP/1.1'); time.sleep(60)", "no message"),
        ("connect(); link.sendall(HEADER.pack(3) + b'abc'); time.sleep(60)", "no message"),
        ("connect(); send(Ready({})); link.close(); time.sleep(60)", "closed its connection"),
        ("import os; os.abort()", "SIGABRT"),
    ],
)
def test_a_death_is_reported_and_followed_by_another_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    monkeypatch.setattr(child, "CLOSING", 0.3)

    async def dying() -> None:
        supervisor = pretending(tmp_path, "print('last words', flush=True);" + source)
        supervisor.start()
        await until(lambda: supervisor.link.restarts == 2)
        assert supervisor.link.state in ("restarting", "ready")
        await supervisor.stop()
        assert supervisor.last_crash is not None
        report = json.loads(supervisor.last_crash.read_text())
        assert reason in report["reason"] and "last words" in report["stderr"]

    run(dying())


def test_one_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    async def dying() -> None:
        supervisor = pretending(tmp_path, "connect(); sys.exit(7)", most_backoff=0.01)
        supervisor.start()
        with pytest.raises(ExecutorError, match=r"ended 5 times before it was ready, .* exit code 7; .*crashes"):
            await supervisor.ready()
        assert supervisor.link.state == "stopped" and supervisor.link.restarts == 4
        await supervisor.stop()

    run(dying())
    assert len([*(tmp_path / "crashes").iterdir()]) == 5


def test_one_that_was_ready_is_not(tmp_path: Path) -> None:
    """Its device may come back."""
    once = f"""
import pathlib
connect()
if not (mark := pathlib.Path({str(tmp_path / "once")!r})).exists():
    mark.touch(); send(Ready({{}})); time.sleep(0.3)
sys.exit(7)
"""

    async def dying() -> None:
        supervisor = pretending(tmp_path, once, most_backoff=0.01)
        supervisor.start()
        await until(lambda: supervisor.link.restarts == 7)
        assert supervisor.link.state in ("restarting", "ready")
        await supervisor.stop()

    run(dying())


def test_what_it_prints_is_logged_line_by_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = """
for part in ("one ", "line\\r\\n\\n", "x" * 5000, "\\ntwo\\x1b[31m\\n", "rest"):
    print(part, end="", flush=True); time.sleep(0.05)
sys.exit(7)
"""
    monkey = logging.getLogger("penstock")
    before, monkey.propagate = monkey.propagate, True
    try:
        with caplog.at_level("INFO", "penstock.serve"):
            run(_once(pretending(tmp_path, source)))
    finally:
        monkey.propagate = before
    lines = [each.fields["line"] for each in caplog.records if hasattr(each, "fields") and "line" in each.fields]
    assert [line for line in lines if not line.startswith("x")] == ["one line", "two\x1b[31m", "rest"]
    assert all(len(line) <= child.LINE for line in lines)
    ended = [each for each in caplog.records if each.getMessage() == "the engine process ended"]
    assert ended and ended[0].levelname == "ERROR"
    written = TextLines().format(next(each for each in caplog.records if "two" in str(getattr(each, "fields", ""))))
    assert "\x1b" not in written and "\n" not in written, "nothing that a terminal would obey"


async def _once(supervisor: Supervisor) -> None:
    supervisor.start()
    await until(lambda: supervisor.link.restarts == 1)
    await supervisor.stop()


def test_backoff_doubles(tmp_path: Path) -> None:
    async def dying() -> list[float]:
        starts: list[float] = []
        supervisor = pretending(tmp_path, "sys.exit(1)", first_backoff=0.1, most_backoff=0.3)
        for deaths in (1, 2, 3, 4, 5):
            supervisor._deaths = deaths
            began = time.monotonic()
            await supervisor._back_off()
            starts.append(time.monotonic() - began)
        return starts

    waits = run(dying())
    for wait, expected in zip(waits, (0.1, 0.2, 0.3, 0.3, 0.3), strict=True):
        assert expected <= wait < expected + 0.1


def test_what_cannot_be_started_is_said(tmp_path: Path) -> None:
    async def starting() -> None:
        supervisor = Supervisor({}, command=["/nonexistent"], crash_dir=tmp_path)
        supervisor.start()
        with pytest.raises(ExecutorError, match="/nonexistent"):
            await supervisor.ready()
        await supervisor.stop()

    run(starting())


def test_arguments_come_by_standard_input_and_are_seen_by_nobody(tmp_path: Path) -> None:
    source = "connect(); send(Failed('', 'OptionError', str(opening.arguments) + str(sys.argv)))"

    async def opening() -> None:
        supervisor = pretending(tmp_path, source)
        supervisor._arguments["token"] = "hf_secret"
        supervisor.start()
        with pytest.raises(OptionError, match=r"'hf_secret'\}\['-c'\]"):
            await supervisor.ready()

    run(opening())


def test_health_follows_the_beats(tmp_path: Path) -> None:
    supervisor = Supervisor({}, crash_dir=tmp_path, stall_timeout=20.0)
    link = supervisor.link
    link.take(Progress("compile", 2, 5))
    assert supervisor.healthy(0.0) == (False, "the engine is being opened: compile, 2 of 5")
    link.connected(Ended())
    link.state = "ready"

    def beat(time: float, steps: int, stepped: float, busy: bool) -> None:
        link.take(Beat(time, steps, stepped, busy, {}))

    beat(100.0, 1, 10.0, False)
    assert supervisor.healthy(104.0)[0], "idle for long is well"
    assert "no sign" in supervisor.healthy(106.0)[1]
    beat(131.0, 1, 110.0, True)
    assert "no step has ended for 21.0 s" in supervisor.healthy(131.0)[1]
    beat(135.0, 2, 134.9, True)
    assert supervisor.healthy(135.0)[0] and link.longest_step == 21.0
    beat(200.0, 2, 134.9, True)
    assert supervisor.healthy(200.0)[0], "steps have taken long before: four times as long is allowed"
    beat(230.0, 2, 134.9, True)
    assert not supervisor.healthy(230.0)[0]
    link.state = "restarting"
    assert supervisor.healthy(230.0) == (False, "the engine is restarting")


def test_a_silent_engine_is_killed_and_an_idle_one_is_not(tmp_path: Path) -> None:
    beats = "connect(); send(Ready({}))\nfor _ in range(12): beat(stepped=0.0); time.sleep(0.1)\n"

    async def hanging() -> float:
        supervisor = pretending(tmp_path, beats + "time.sleep(60)", hang_timeout=0.5)
        supervisor.start()
        await supervisor.ready()
        began = time.monotonic()
        await until(lambda: supervisor.link.restarts == 1)
        await supervisor.stop()
        return time.monotonic() - began

    assert run(hanging()) > 1.5, "it beat for more than a second"


def test_stop_lets_requests_end_and_tells_the_others(tmp_path: Path) -> None:
    source = """
connect(); send(Ready({}))
stream = link.makefile("rb")
for text in iter(lambda: stream.read(HEADER.unpack(stream.read(4))[0]), b""):
    message = read_to_engine(text)
    if isinstance(message, Stop): sys.exit(0)
    if message.id == "quick":
        time.sleep(0.2); send(Parts([Part("quick", 0, [1], "stop")]))
"""

    async def stopping() -> None:
        supervisor = pretending(tmp_path, source)
        supervisor.start()
        await supervisor.ready()
        quick, slow = (supervisor.link.submit(Submit(name, [1])) for name in ("quick", "slow"))
        began = time.monotonic()
        stopped = asyncio.create_task(supervisor.stop(drain=0.6))
        await asyncio.sleep(0)
        with pytest.raises(EngineUnready):
            supervisor.link.submit(Submit("late", [1]))
        assert (await quick.parts())[0].finish == "stop"
        with pytest.raises(EngineDied, match="shut down"):
            await slow.parts()
        await stopped
        assert 0.5 < time.monotonic() - began < 3
        assert not (tmp_path / "crashes").exists()

    run(stopping())


class Wire:
    """A client's connection without a socket."""

    def __init__(self) -> None:
        self.client, self.sent = EngineClient(), bytearray()
        self.frames = Frames(self.client)
        self.client.connected(self)  # type: ignore[arg-type]
        self.client.state = "ready"

    def write(self, data: bytes) -> None:
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return 0

    def come(self, data: bytes, pieces: int = 1 << 30) -> None:
        for at in range(0, len(data), pieces):
            piece = data[at : at + pieces]
            while piece:
                room = self.frames.get_buffer(-1)
                assert len(room), "there is room always"
                part, piece = piece[: len(room)], piece[len(room) :]
                room[: len(part)] = part
                self.frames.buffer_updated(len(part))


@pytest.mark.parametrize("pieces", [1, 3, 4, 5, 1000, 1 << 18, 1 << 30])
def test_messages_come_whole_however_they_are_cut(pieces: int) -> None:
    wire = Wire()
    sizes = [1, 100, 10_000] if pieces < 1000 else [1, 300_000, 2, 100_000, 600_000]
    messages: list[FromEngine] = [Parts([Part("a", 0, [*range(size)])]) for size in sizes]
    end = Parts([Part("a", 0, [], "stop")])

    async def come() -> list[Part]:
        reply = wire.client.submit(Submit("a", [1]))
        wire.come(b"".join(map(frame, [*messages, end])), pieces)
        return await reply.parts()

    assert [len(part.tokens) for part in run(come())] == [*sizes, 0]
    assert len(wire.frames._buffer) == 1 << 18, "the room of a long message is given back"


def test_errors_have_their_class_and_come_behind_the_parts() -> None:
    wire = Wire()

    async def fail() -> None:
        reply = wire.client.submit(Submit("a", [1]))
        strange = wire.client.submit(Submit("b", [1]))
        wire.come(frame(Parts([Part("a", 0, [5])])) + frame(Failed("a", "OptionError", "no")))
        wire.come(frame(Failed("b", "SystemExit", "no")))
        assert (await reply.parts())[0].tokens == [5]
        for _ in range(2):
            with pytest.raises(OptionError):
                await reply.parts()
        with pytest.raises(ExecutorError):
            await strange.parts()

    run(fail())


def test_a_connection_that_has_ended_takes_nothing(tmp_path: Path) -> None:
    """Before anybody has seen the process end."""
    supervisor = Supervisor({}, crash_dir=tmp_path)
    client, frames, ended = supervisor.link, Frames(supervisor.link), Ended()

    async def late() -> None:
        frames.connection_made(ended)
        client.state = "ready"
        assert supervisor.healthy(0.0)[0]
        reply = client.submit(Submit("a", [1]))
        ended.closed = True
        frames.connection_lost(None)
        with pytest.raises(EngineUnready, match="the engine process has ended; try again in"):
            client.submit(Submit("b", [1]))
        reply.abort()
        assert supervisor.healthy(0.0) == (False, "the engine process has ended")

    run(late())


class Ended(asyncio.Transport):
    """As uvloop's: written to behind its end it raises."""

    closed = False

    def write(self, data: object) -> None:
        if self.closed:
            raise RuntimeError("unable to perform operation; the handler is closed")

    def get_write_buffer_size(self) -> int:
        return 0


def test_parts_of_a_text_are_joined_in_order() -> None:
    parts = [Part("a", i % 3, [i], logprobs=[{i: -1.0}], notes=["n"] if i < 3 else []) for i in range(30)]
    parts += [Part("a", 1, [99], "stop", stop_token=99, logprobs=[{99: 0.0}])]
    found = joined(parts)
    assert [part.index for part in found] == [0, 1, 2]
    assert found[1].tokens == [*range(1, 30, 3), 99] and found[1].stop_token == 99 and found[1].notes == ["n"]
    assert found[1].logprobs is not None and len(found[1].logprobs) == 11


def test_no_torch_comes_with_it() -> None:
    source = "import sys, penstock.serve.supervisor; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], timeout=60, check=False).returncode == 0


def test_reports_are_counted_and_boxes_may_be_missing(tmp_path: Path) -> None:
    for pid in range(25):
        report = crash.Crash("r", 1, None, 0.0, pid, 0, {}, {}, None, [], "", "")
        newest = crash.write(report, tmp_path)
    assert newest.exists() and len([*tmp_path.iterdir()]) == crash.KEPT
    assert read_box(tmp_path / "none") == [] and read_box(newest) == []
