"""The executor's thread: opens the engine, takes submissions from any thread, steps while there is work."""

from __future__ import annotations

import atexit
import itertools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar, cast

from penstock.errors import ExecutorError, PenstockError
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Order, Submission
from penstock.runtime.requests import RequestOutput

Result = TypeVar("Result")
QUIET = 0.02  # seconds without a command before idle work is begun
_IDS = itertools.count()
_OPEN: weakref.WeakSet[Loop] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """At the interpreter's end: a thread that is cut off inside torch would take the process down with it."""
    for loop in tuple(_OPEN):
        with suppress(ExecutorError):  # a fork's: it has no thread
            loop.close()


def fresh_id() -> str:
    """A request id that this process has not used."""
    return f"request-{next(_IDS)}"


class _Command:
    """Work for the executor's thread; `reply` hears what came of it there: (result, None) or (None, error)."""

    __slots__ = ("reply", "work")

    def __init__(self, work: Callable[[], object], reply: Callable[[Any, Exception | None], None]) -> None:
        self.work, self.reply = work, reply

    def run(self) -> None:
        try:
            result = self.work()
        except Exception as error:  # whoever sent it hears of it
            self.reply(None, error)
        else:
            self.reply(result, None)


class Loop:
    """Runs an executor in a thread of its own, which also opens and closes it: a device's handles belong to a thread.

    `open_executor` runs there; what it raises is raised here. After a failure of the loop itself every later call
    raises that failure. In idle moments the backend gets the time, to capture what it has not yet.
    """

    def __init__(self, open_executor: Callable[[], Executor]) -> None:
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._refusal: PenstockError | None = None  # set once no more commands are taken
        self._more_idle_work = True
        self._pid = os.getpid()
        opened: Future[Executor] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(open_executor, opened), name="penstock-executor", daemon=True
        )
        self._thread.start()
        self.executor = opened.result()
        _OPEN.add(self)

    @property
    def failure(self) -> PenstockError | None:
        """Why no more is taken: it failed, or was closed."""
        return self._refusal

    def call(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the executor's thread and return its result, or raise its error here."""
        answer: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        self._send(_Command(work, lambda result, error: answer.put((result, error))))
        result, error = answer.get()
        if error is not None:
            raise error
        return cast(Result, result)

    def snapshot(self) -> dict[str, Any]:
        """The executor's counters; also of one that has ended."""
        with suppress(PenstockError):
            return self.call(self.executor.snapshot)
        self._thread.join()
        return self.executor.snapshot()

    def post(self, work: Callable[[], object], failed: Callable[[Exception], None]) -> None:
        """Run `work` on the executor's thread and do not wait: `failed` is called there with the error it raised."""
        self._send(_Command(work, lambda _, error: failed(error) if error is not None else None))

    def _send(self, command: _Command) -> None:
        if threading.current_thread() is self._thread:
            raise ExecutorError(
                "the engine was called from its own thread, which would wait for itself; call it from yours"
            )
        if os.getpid() != self._pid:
            raise ExecutorError("the engine was opened before this process forked, and stayed behind; open one here")
        with self._lock:
            if self._refusal is not None:
                raise self._refusal
            self._commands.put(command)

    def submit(self, new: Submission) -> None:
        """Raises what the executor's gate raises."""
        order = self.executor.prepare(new)
        self.call(lambda: self.executor.submit(order))

    def abort(self, *request_ids: str) -> None:
        """Unknown ids have ended already; so have all once the loop is closed."""
        if self._refusal is None:
            self.call(lambda: _abort_all(self.executor, request_ids))

    def close(self) -> None:
        """End the thread and free the device; requests still running end with an error."""
        if threading.current_thread() is self._thread or os.getpid() != self._pid:
            raise ExecutorError("the engine can be shut down from another thread of its own process alone")
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
                executor.step()
            self._end(executor, ExecutorError("the engine was shut down while this request was running"))
        except BaseException as error:  # the thread's border: everyone who waits must hear of it
            failure = ExecutorError(f"the executor failed: {type(error).__name__}: {error}; open the engine again")
            failure.__cause__ = error
            self._end(executor, failure)

    def _take_commands(self, executor: Executor) -> bool:
        """Run what has arrived; wait when there is nothing else to do. False: time to end."""
        wait = not executor.busy
        while wait or not self._commands.empty():
            command = self._next(executor)
            if command is None:
                return False
            command.run()
            wait, self._more_idle_work = False, True  # requests of a new kind may want captures
        return True

    def _next(self, executor: Executor) -> _Command | None:
        """The next command, taken as soon as it comes.

        When none has come for a while the backend gets the time, for a capture must not stand between a request and
        the one that follows.
        """
        while self._more_idle_work and not executor.busy:
            with suppress(queue.Empty):
                return self._commands.get(timeout=QUIET)
            self._more_idle_work = executor.backend.idle()
        return self._commands.get()

    def _end(self, executor: Executor, error: PenstockError) -> None:
        """Refuse what comes, end what runs, answer what waits in the queue, and give the device back."""
        with self._lock:
            self._refusal = self._refusal or error
        executor.fail_all(error)
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                command.reply(None, error)
        executor.close()


class Gather:
    """Where the last outputs of a batch meet, as its submissions' sink; its caller is woken once."""

    def __init__(self, count: int) -> None:
        self.outputs: dict[str, RequestOutput] = {}
        self._count = count
        self._end: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def put(self, result: RequestOutput | Exception) -> None:
        """On the executor's thread."""
        if isinstance(result, Exception):
            self._end.put(result)
            return
        self.outputs[result.request_id] = result
        if len(self.outputs) == self._count:
            self._end.put(None)

    def wait(self) -> None:
        """Until all have come; raises the first error instead."""
        if self._count and (error := self._end.get()) is not None:
            raise error


def run_all(loop: Loop, submissions: Sequence[Submission], gather: Gather) -> list[RequestOutput]:
    """Submit all or none, and wait for all; `gather.put` is the submissions' sink.

    Outputs in the order of the submissions. An error of one ends the others and is raised.
    """
    orders = [loop.executor.prepare(each) for each in submissions]
    try:
        loop.post(lambda: _submit_all(loop.executor, orders), gather.put)
        gather.wait()
    finally:  # an error, or the caller's Ctrl-C
        if left := [each.id for each in submissions if each.id not in gather.outputs]:
            loop.abort(*left)
    return [gather.outputs[each.id] for each in submissions]


def _abort_all(executor: Executor, request_ids: Sequence[str]) -> None:
    for each in request_ids:
        executor.abort(each)


def _submit_all(executor: Executor, orders: Sequence[Order]) -> None:
    for index, each in enumerate(orders):
        try:
            executor.submit(each)
        except PenstockError:
            _abort_all(executor, [other.id for other in orders[:index]])
            raise
