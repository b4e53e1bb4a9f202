"""The executor's thread: takes submissions from any thread, steps while there is work, captures while there is none."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from penstock.errors import ExecutorError, PenstockError
from penstock.runtime.executor import Executor, Submission

Result = TypeVar("Result")
Command = Callable[[], None]
_IDS = itertools.count()


def fresh_id() -> str:
    """A request id that this process has not used."""
    return f"request-{next(_IDS)}"


class Loop:
    """Runs an executor in its own thread. After a failure of the loop itself every later call raises its error."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.failure: PenstockError | None = None
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._open = True
        self._more_idle_work = True
        self._thread = threading.Thread(target=self._run, name="penstock-executor", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the executor's thread and return its result, or raise its error here."""
        if not self._open:
            raise self.failure or ExecutorError("the engine was shut down; open it again")
        future: Future[Result] = Future()
        self._commands.put(lambda: _settle(future, work))
        return future.result()

    def submit(self, new: Submission) -> None:
        """Raises what the executor's gate raises."""
        self.call(lambda: self.executor.submit(new))

    def abort(self, request_id: str) -> None:
        self.call(lambda: self.executor.abort(request_id))

    def close(self) -> None:
        """Let the thread end; requests still running end with an error."""
        if self._open:
            self._open = False
            self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_commands():
                if not self.executor.step() and self._more_idle_work and self._commands.empty():
                    self._more_idle_work = self.executor.backend.idle()
            self.executor.fail_all(ExecutorError("the engine was shut down while this request was running"))
        except Exception as error:  # the thread's border: everyone who waits must hear of it
            self._open = False
            self.failure = ExecutorError(f"the executor failed: {type(error).__name__}: {error}")
            self.failure.__cause__ = error
            self.executor.fail_all(self.failure)
        self._refuse_rest()

    def _take_commands(self) -> bool:
        """Run what has arrived; wait when there is nothing else to do. False: time to end."""
        wait = not self.executor.busy and not self._more_idle_work
        while wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            wait = False
        return True

    def _refuse_rest(self) -> None:
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                command()


def _settle(future: Future[Result], work: Callable[[], Result]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # the caller's thread raises it
        future.set_exception(error)
