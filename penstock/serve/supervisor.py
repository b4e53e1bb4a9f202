"""Keeps an engine process running: starts it, watches it, ends one that hangs, and starts it again.

The command it runs gets an `Opening` on its standard input and connects to the socket named there (see
`penstock.serve.engine`); a test may name a command of its own that does the same.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from penstock.errors import (
    CheckpointError,
    EngineError,
    ExecutorError,
    InputError,
    ModelError,
    PenstockError,
    ResourceError,
    UnsupportedError,
)
from penstock.serve import crash, logs
from penstock.serve.child import Child, spawn
from penstock.serve.client import EngineClient, error_of
from penstock.serve.link import EngineDied, EngineUnready, State
from penstock.serve.wire import Beat, Stop

COMMAND: Final = (sys.executable, "-m", "penstock.serve.engine")
# What another attempt would not mend, as long as none has succeeded.
MISTAKES: Final = (InputError, ModelError, CheckpointError, EngineError, ResourceError, UnsupportedError)
STEADY: Final = 60.0  # seconds of running after which a death counts as the first again
BEAT_AGE: Final = 5.0  # seconds without a beat that health allows
WATCH: Final = 0.25  # seconds between two looks at a running process
GRACE: Final = 10.0  # seconds to end in, once told to
MOST_DEATHS: Final = 5  # in a row, before any process was ready; another would do the same
STACKS: Final = 0.5  # seconds to write its stacks in, before it is killed
LATE: Final = 1.0  # seconds that a look may be late; above, it is this process that hung, and beats wait to be read


class Supervisor:
    """`link` is what requests go through. Everything here belongs to one event loop."""

    def __init__(
        self,
        arguments: Mapping[str, Any],
        *,
        command: Sequence[str] = COMMAND,
        crash_dir: Path | None = None,
        hang_timeout: float = 120.0,
        stall_timeout: float = 20.0,
        first_backoff: float = 1.0,
        most_backoff: float = 60.0,
    ) -> None:
        """`arguments`: of LLM. hang_timeout: seconds without a step, while there is work, after which the process is
        killed; 0: never. stall_timeout: the same until it counts as unhealthy. Backoffs: seconds before it is started
        again, doubling from the first to the most."""
        self.link = EngineClient()
        self.link.refusal, self.link.opened = self._unready, self._is_ready
        self.error: PenstockError | None = None  # why there will be no engine
        self.last_crash: Path | None = None  # the newest report
        self._arguments, self._command = dict(arguments), tuple(command)
        self._crash_dir = crash.crash_dir(crash_dir)
        self._hang_timeout, self._stall_timeout = hang_timeout, stall_timeout
        self._backoff = first_backoff, most_backoff
        self._deaths = 0  # in a row
        self._load_seconds: float | None = None  # that opening took last
        self._next_start = 0.0
        self._stopping, self._changed = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._child: Child | None = None

    def start(self) -> None:
        """Begin; `ready` waits for the engine."""
        self._task = asyncio.create_task(self._keep())

    async def ready(self) -> None:
        """Until the engine takes requests. Raises what it cannot be opened for."""
        while self.link.state != "ready":
            if self.link.state == "stopped":
                raise self.error or EngineDied("the engine was shut down")
            self._changed.clear()
            await self._changed.wait()

    async def stop(self, drain: float = 0.0) -> None:
        """Take no more requests, let those there are run for so many seconds at most, and end the process."""
        end = time.monotonic() + drain
        self._stopping.set()
        self._set("stopped")
        while self.link.num_open and self._child is not None and time.monotonic() < end:
            await asyncio.sleep(0.02)
        if (child := self._child) is not None:
            self.link.send(Stop())
            with suppress(TimeoutError):
                await asyncio.wait_for(child.process.wait(), GRACE if child.connected else 0)
            child.kill()
        if self._task is not None:
            await self._task

    def healthy(self, now: float | None = None) -> tuple[bool, str]:
        """Whether it takes requests and gets on with them, and if not, why. `now`: on the monotonic clock."""
        link = self.link
        if link.state == "loading":
            stage, done, total = link.progress
            return False, f"the engine is being opened: {stage}" + (f", {done} of {total}" if total else "")
        if link.state != "ready":
            return False, f"the engine is {link.state}"
        if not link.is_connected:
            return False, "the engine process has ended"
        now = time.monotonic() if now is None else now
        beat = link.beat
        if (silent := now - self._seen(beat)) > BEAT_AGE:
            return False, f"no sign of the engine for {silent:.1f} s"
        allowed = max(self._stall_timeout, 4 * link.longest_step)
        if beat is not None and beat.busy and now - beat.stepped > allowed:
            return (
                False,
                f"requests wait, and no step has ended for {now - beat.stepped:.1f} s; it may take {allowed:g}",
            )
        return True, "ok"

    def _seen(self, beat: Beat | None) -> float:
        """When there was a sign of it, or when it was ready."""
        if beat is not None:
            return beat.time
        return self._child.ready_at or self._child.started if self._child else 0.0

    def _unready(self) -> EngineUnready:
        """What a request hears that comes now."""
        wait = self._next_start - time.monotonic() if self.link.state == "restarting" else 0.0
        after = 30.0 if self.link.state == "stopped" else max(1.0, wait + (self._load_seconds or 5.0))
        return EngineUnready(f"{self.healthy()[1]}; try again in {after:.0f} s", after)

    def _set(self, state: State) -> None:
        self.link.state = state
        self._changed.set()

    def _is_ready(self) -> None:
        child = self._child
        if child is None or self._stopping.is_set():
            return
        child.ready_at = time.monotonic()
        self._load_seconds = child.ready_at - child.started
        self._set("ready")

    async def _keep(self) -> None:
        """One process after another."""
        try:
            while not self._stopping.is_set():
                with tempfile.TemporaryDirectory(prefix="penstock-") as folder:  # for its owner alone
                    await self._live(Path(folder))
                if self.link.state == "stopped":
                    break
                await self._back_off()
        except OSError as error:
            self.error = ExecutorError(f"the engine process cannot be started: {error}; see to that, and start again")
        finally:
            self.link.lost(EngineDied("the engine was shut down"))
            self._set("stopped")

    async def _back_off(self) -> None:
        first, most = self._backoff
        wait = min(most, first * 2.0 ** min(self._deaths - 1, 30))
        self._next_start = time.monotonic() + wait
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), wait)

    async def _live(self, folder: Path) -> None:
        """Of one process, from its start to its end."""
        child = await spawn(self._command, self._arguments, folder, self.link)
        self._child = child
        watching = asyncio.create_task(self._watch(child))
        try:
            code = await child.ended()
        finally:
            watching.cancel()
            child.kill()
            self._child = None
        self._mourn(child, code)

    async def _watch(self, child: Child) -> None:
        """Kill it when it hangs, or is no longer to be talked to."""
        while child.reason is None:
            due = time.monotonic() + WATCH
            await asyncio.sleep(WATCH)
            if time.monotonic() - due < LATE:
                child.reason = child.broken or self._hang(child)
        if not child.broken:
            child.write_stacks()
            await asyncio.sleep(STACKS)
        child.kill()

    def _hang(self, child: Child) -> str | None:
        """Why it counts as hung, if it does."""
        beat = self.link.beat
        if child.ready_at is None or not self._hang_timeout:
            return None
        since = beat.stepped if beat is not None and beat.busy else self._seen(beat)
        silent = time.monotonic() - since
        return f"it hung: nothing for {silent:.1f} s" if silent > self._hang_timeout else None

    def _mourn(self, child: Child, code: int) -> None:
        """Tell whoever waits, and settle whether there is another."""
        if self._stopping.is_set():
            return
        mistake = error_of(self.link.opening_error) if self.link.opening_error else None
        if self._load_seconds is None and isinstance(mistake, MISTAKES):
            self.error = mistake
            self._set("stopped")
            return
        steady = child.ready_at is not None and time.monotonic() - child.ready_at > STEADY
        self._deaths = 1 if steady else self._deaths + 1
        broken = child.broken if child.frames.error else None
        reason = child.reason or broken or (f"{type(mistake).__name__}: {mistake}" if mistake else _exit(code))
        self._report(child, code, reason)
        if self._load_seconds is None and self._deaths >= MOST_DEATHS:
            self.error = ExecutorError(
                f"the engine process ended {self._deaths} times before it was ready, the last time so: {reason}; "
                f"the reports are in {self._crash_dir}"
            )
            self._set("stopped")
            return
        self.link.restarts += 1
        self._set("restarting")
        self.link.lost(EngineDied(f"the engine process ended and took this request along: {_exit(code)}; try again"))

    def _report(self, child: Child, code: int, reason: str) -> None:
        link, now = self.link, time.monotonic()
        beat_age = None if link.beat is None else now - link.beat.time
        stats = {} if link.beat is None else link.beat.stats
        report = crash.Crash(
            reason, code, crash.signal_of(code), now - child.started, child.process.pid, link.num_open, link.facts,
            stats, beat_age, child.steps(), child.stacks(), child.printed,
        )  # fmt: skip
        try:
            self.last_crash = crash.write(report, self._crash_dir)
            where: dict[str, object] = {"report": self.last_crash}
        except OSError as error:
            where = {"no_report": str(error)}
        logs.say("the engine process ended", {"reason": reason, "pid": report.pid, **where}, logging.ERROR)


def _exit(code: int) -> str:
    return f"killed by {name}" if (name := crash.signal_of(code)) else f"exit code {code}"
