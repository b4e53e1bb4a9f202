"""What each step was and when it ran, for whoever measures a run: off unless somebody attaches a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from penstock.ir.lazy import torch
from penstock.runtime.schedule.batch import StepPlan

if TYPE_CHECKING:
    from penstock.runtime.executor import Executor

WASTE_EVERY = 32  # steps between two looks at the pool


@dataclass(slots=True)
class LoggedStep:
    """`decoding`: rows behind their prompts. `learnt`: of them, those whose requests took the token. `launched`,
    `read`: monotonic seconds, of the launch's begin and of when the host had the tokens. `busy`: seconds from the
    replay's begin to its end on the device, gaps between its kernels included; `gap`: from the end of the replay before
    to its begin. On a CPU a launch is the step.
    """

    tokens: int
    rows: int
    logits: int
    decoding: int
    launched: float
    learnt: int = 0
    read: float = 0.0
    busy: float = 0.0
    gap: float = 0.0
    marks: tuple[Any, Any] | None = field(default=None, repr=False)  # events around the replay


class StepLog:
    """The steps of an executor from `attach` to `detach`, both on its thread. Costs it some microseconds a step.

    Where the host is late, a replay's begin is when it was asked for: up to some 10 us before its first kernel runs.
    """

    def __init__(self) -> None:
        self.steps: list[LoggedStep] = []
        self.waste: list[float] = []  # of the KV pool, now and then while two or more requests run
        self._open: dict[int, LoggedStep] = {}
        self._executor: Executor | None = None

    def attach(self, executor: Executor) -> None:
        """One log at a time."""
        assert executor.log is None, "another log is attached"
        self._executor, executor.log = executor, self
        if executor.engine.device.kind == "cuda":
            executor.backend.timer = self.replay

    def detach(self) -> None:
        """No step may be in flight."""
        assert self._executor is not None and not self._open, "a step is in flight"
        self._executor.log = self._executor.backend.timer = None
        self._read_marks()

    def launching(self, plan: StepPlan) -> None:
        """A plan is about to be launched."""
        assert self._executor is not None
        decoding = len(plan.decoders.requests)
        step = LoggedStep(plan.num_tokens, plan.num_rows, plan.num_logits, decoding, time.monotonic())
        self._open[plan.step_id] = step
        if len(self.steps) % WASTE_EVERY == WASTE_EVERY // 2 and plan.num_rows > 1:
            self.waste.append(self._executor.scheduler.waste())
        self.steps.append(step)

    def launched(self) -> None:
        """On a CPU it has run."""
        step = self.steps[-1]
        if step.marks is None:
            step.busy = time.monotonic() - step.launched

    def replay(self, run: Callable[[], None]) -> None:
        """Run it between two events of the device."""
        marks = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        marks[0].record()
        run()
        marks[1].record()
        self.steps[-1].marks = marks

    def read(self, plan: StepPlan) -> None:
        """The plan's tokens are there; its requests have not heard of them."""
        if step := self._open.pop(plan.step_id, None):
            step.read = time.monotonic()
            step.learnt = sum([request.finish_reason is None for request in plan.decoders.requests])

    def failed(self, plan: StepPlan) -> None:
        """Of a step that died nothing is kept but that it was launched."""
        self._open.pop(plan.step_id, None)

    def _read_marks(self) -> None:
        last = None
        for step in self.steps:
            if step.marks is None:
                continue
            start, end = step.marks
            end.synchronize()
            step.busy = start.elapsed_time(end) / 1e3
            step.gap = max(0.0, last.elapsed_time(start) / 1e3) if last is not None else 0.0
            step.marks, last = None, end
