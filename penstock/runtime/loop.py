"""The executor's thread: opens the engine, takes submissions from any thread, steps while there is work."""

from __future__ import annotations

import atexit
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from penstock.errors import ExecutorError, PenstockError
from penstock.runtime.executor import Executor, Submission
from penstock.runtime.requests import RequestOutput

Result = TypeVar("Result")
QUIET = 0.02  # seconds without a command before idle work is begun
_IDS = itertools.count()
_OPEN: weakref.WeakSet[Loop] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """At the interpreter's end: a thread that is cut off inside torch would take the process down with it."""
    for loop in tuple(_OPEN):
        loop.close()


def fresh_id() -> str:
    """A request id that this process has not used."""
    return f"request-{next(_IDS)}"


class _Command(Generic[Result]):
    """Work for the executor's thread, and where its caller waits."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self.work = work
        self.future: Future[Result] = Future()

    def run(self) -> None:
        try:
            self.future.set_result(self.work())
        except Exception as error:  # the caller's thread raises it
            self.future.set_exception(error)


class Loop:
    """Runs an executor in a thread of its own, which also opens and closes it: a device's handles belong to a thread.

    `open_executor` runs there; what it raises is raised here. After a failure of the loop itself every later call
    raises that failure. In idle moments the backend gets the time, to capture what it has not yet.
    """

    def __init__(self, open_executor: Callable[[], Executor]) -> None:
        self._commands: queue.SimpleQueue[_Command[object] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._refusal: PenstockError | None = None  # set once no more commands are taken
        self._more_idle_work = True
        opened: Future[Executor] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(open_executor, opened), name="penstock-executor", daemon=True
        )
        self._thread.start()
        self.executor = opened.result()
        _OPEN.add(self)

    def call(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the executor's thread and return its result, or raise its error here."""
        command = _Command(work)
        with self._lock:
            if self._refusal is not None:
                raise self._refusal
            self._commands.put(command)  # type: ignore[arg-type]  # a queue of commands of any result
        return command.future.result()

    def submit(self, new: Submission) -> None:
        """Raises what the executor's gate raises."""
        self.call(lambda: self.executor.submit(new))

    def abort(self, request_id: str) -> None:
        """Unknown ids have ended already; so have all once the loop is closed."""
        if self._refusal is None:
            self.call(lambda: self.executor.abort(request_id))

    def close(self) -> None:
        """End the thread and free the device; requests still running end with an error."""
        with self._lock:
            if self._refusal is None:
                self._refusal = ExecutorError("the engine was shut down; open it again")
                self._commands.put(None)
        self._thread.join()

    def _run(self, open_executor: Callable[[], Executor], opened: Future[Executor]) -> None:
        try:
            executor = open_executor()
        except BaseException as error:  # whoever opens the loop waits for it
            opened.set_exception(error)
            return
        self.executor = executor
        opened.set_result(executor)
        try:
            while self._take_commands(executor):
                if not executor.step() and self._more_idle_work and self._quiet():
                    self._more_idle_work = executor.backend.idle()
            self._end(executor, ExecutorError("the engine was shut down while this request was running"))
        except Exception as error:  # the thread's border: everyone who waits must hear of it
            failure = ExecutorError(f"the executor failed: {type(error).__name__}: {error}; open the engine again")
            failure.__cause__ = error
            self._end(executor, failure)

    def _quiet(self) -> bool:
        """Whether nobody has come for a while: a capture must not stand between a request and the one that follows."""
        until = time.monotonic() + QUIET
        while time.monotonic() < until:
            if not self._commands.empty():
                return False
            time.sleep(QUIET / 20)
        return True

    def _take_commands(self, executor: Executor) -> bool:
        """Run what has arrived; wait when there is nothing else to do. False: time to end."""
        wait = not executor.busy and not self._more_idle_work
        while wait or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command.run()
            wait = False
        return True

    def _end(self, executor: Executor, error: PenstockError) -> None:
        """Refuse what comes, end what runs, answer what waits in the queue, and give the device back."""
        with self._lock:
            self._refusal = self._refusal or error
        executor.fail_all(error)
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                command.future.set_exception(error)
        executor.backend.close()


def run_all(
    loop: Loop, submissions: Sequence[Submission], done: queue.SimpleQueue[RequestOutput | PenstockError]
) -> list[RequestOutput]:
    """Submit all or none, and wait for all; `done` is what the submissions' sinks put their last output into.

    Outputs in the order of the submissions. An error of one ends the others and is raised.
    """
    loop.call(lambda: _submit_all(loop.executor, submissions))
    outputs: dict[str, RequestOutput] = {}
    try:
        for _ in submissions:
            result = done.get()
            if isinstance(result, PenstockError):
                raise result
            outputs[result.request_id] = result
    finally:  # an error, or the caller's Ctrl-C
        for each in submissions:
            if each.id not in outputs:
                loop.abort(each.id)
    return [outputs[each.id] for each in submissions]


def _submit_all(executor: Executor, submissions: Sequence[Submission]) -> None:
    for index, each in enumerate(submissions):
        try:
            executor.submit(each)
        except PenstockError:
            for other in submissions[:index]:
                executor.abort(other.id)
            raise
