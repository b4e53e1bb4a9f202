"""The real engine process with the bundled model, and what was sent to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from penstock import bundled
from penstock.grammar.compiled import Compiled
from penstock.serve.grammar_process import GrammarClient
from penstock.serve.link import Reply, State
from penstock.serve.supervisor import Supervisor
from penstock.serve.wire import Beat, Submit
from penstock.text import Tokenizer

T = TypeVar("T")


class Noted:
    """An `Engine` of the server over a supervisor. aborted: (request, text) in order."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor, self._link = supervisor, supervisor.link
        self.submitted: list[Submit] = []
        self.aborted: list[tuple[str, int | None]] = []

    @property
    def state(self) -> State:
        return self._link.state

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._link.facts

    @property
    def beat(self) -> Beat | None:
        return self._link.beat

    @property
    def progress(self) -> tuple[str, int, int]:
        return self._link.progress

    @property
    def restarts(self) -> int:
        return self._link.restarts

    def healthy(self, now: float) -> tuple[bool, str]:
        return self._supervisor.healthy(now)

    def submit(self, new: Submit, grammar: Compiled | None = None) -> Reply:
        self.submitted.append(new)
        reply = self._link.submit(new, grammar)
        tell, aborted = reply.abort, self.aborted

        def abort(index: int | None = None) -> None:
            aborted.append((new.id, index))
            tell(index)

        reply.abort = abort  # type: ignore[method-assign]
        return reply


class RealEngine:
    """One process and one event loop for many tests."""

    def __init__(self, crashes: Path) -> None:
        self._runner = asyncio.Runner()
        self.supervisor = self.run(self._start, crashes)
        facts = self.supervisor.link.facts
        tokenizer = Tokenizer.from_dir(bundled.target())
        self.grammars = GrammarClient(tokenizer, facts["vocab_size"], facts["eos"], seconds=30)  # shared: slow to start

    def run(self, work: Callable[..., Awaitable[T]], *args: Any) -> T:
        async def call() -> T:
            return await work(*args)

        return self._runner.run(call())

    async def _start(self, crashes: Path) -> Supervisor:
        found = Supervisor({"device": "cpu", "dtype": "float32", "max_batch_size": 16}, crash_dir=crashes)
        found.start()
        await found.ready()
        return found

    async def idle(self) -> None:
        """Until there is no work, within seconds."""
        now = time.monotonic()
        while (beat := self.supervisor.link.beat) is None or beat.busy or beat.time < now:
            assert time.monotonic() < now + 5
            await asyncio.sleep(0.02)

    def close(self) -> None:
        self.grammars.close()
        self.run(self.supervisor.stop)
        self._runner.close()
