"""The loop's body: the only place where schedule, KV, step and sampling meet.

`step` plans and launches the next batch, then takes the tokens of the oldest one in flight: the host always lags the
device, and its own work hides behind the device's. One thread calls everything here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from penstock.engine.ideal import StepRoof
from penstock.engine.manifest import Engine
from penstock.errors import ExecutorError, OptionError, PenstockError, SamplingError
from penstock.grammar.guide import Filler, Guide
from penstock.runtime.intake import Intake, Order, Submission
from penstock.runtime.job import Job, candidates_of, keep_scores
from penstock.runtime.kv.blocks import BlockPool
from penstock.runtime.kv.manager import KvManager
from penstock.runtime.kv.tables import Tables
from penstock.runtime.masks import Masks
from penstock.runtime.output import Stream
from penstock.runtime.pace import Pace
from penstock.runtime.schedule.batch import Event, StepPlan
from penstock.runtime.schedule.beams import Candidate
from penstock.runtime.schedule.deadlines import Deadlines
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.request import FinishReason, Request
from penstock.runtime.schedule.scheduler import Scheduler
from penstock.runtime.stats import Stats, snapshot
from penstock.runtime.step import PLAIN_TAIL, Backend, Tail, Ticket
from penstock.runtime.steplog import StepLog
from penstock.runtime.upload import Encoder, Source
from penstock.text.tokenizer import Tokenizer


class Executor:
    """Runs submissions to their end. Raises PromptError and the like from `submit`, before any work."""

    def __init__(
        self,
        engine: Engine,
        backend: Backend,
        tokenizer: Tokenizer | None,
        limits: Limits | None = None,
        reuse: bool = True,
        pace: Pace | None = None,
    ) -> None:
        """`limits` within the engine's profile; None: the profile's own. `reuse`: of the KV of equal prefixes. `pace`:
        where the time between tokens has a target."""
        profile = engine.profile
        self.engine, self.backend, self.tokenizer = engine, backend, tokenizer
        self.kv = _kv_manager(engine, backend, reuse)
        limits = limits or Limits(profile.max_batch_size, profile.max_num_tokens, profile.max_seq_len)
        limits = replace(limits, max_steps_in_flight=backend.steps_in_flight)
        self.scheduler = Scheduler(limits, self.kv, pace.budget if pace else None)
        self.stats = Stats()
        self._intake = Intake(engine, tokenizer, self.scheduler)
        self._encoder = Encoder(profile.slots, profile.upload_size)
        self._live: dict[str, Job] = {}
        self._orders: dict[str, dict[str, None]] = {}  # by id, its live jobs in their order
        self._failing: list[tuple[Job, PenstockError]] = []  # of the step being launched
        self._deadlines = Deadlines()
        self._pace = pace
        self._roof = StepRoof(engine) if engine.roof else None
        self._read_at = 0.0  # when the last step was read
        self._active_since = 0.0  # up to when the time with requests is counted
        self._in_flight: deque[tuple[StepPlan, Ticket, float | None]] = deque()  # launched when, if on the fast path
        self._filler = Filler()
        self._early: dict[int, list[int]] = {}  # tokens of steps in flight that were read, for masks, by ticket
        self.log: StepLog | None = None  # of every step, where somebody measures
        self.recorder: Callable[[StepPlan], None] | None = None  # gets each plan before its launch
        self.num_moves = 0  # steps read or failed
        self.num_failures = 0  # of them, those that failed since one was read
        self.moved_at = 0.0  # the last time, or when work came to an idle executor
        self._counted = 0.0  # the thread's CPU time up to which the host's is counted, or was the device's

    @property
    def busy(self) -> bool:
        return self.scheduler.has_work

    def prepare(self, new: Submission) -> Order:
        """Check a submission and work out all that needs neither the device nor other requests; on any thread."""
        return self._intake.prepare(new)

    def warm(self) -> None:
        """Load what grammars need, for which the first would wait. Any thread. Raises SamplingError where it cannot."""
        self._intake.warm()

    def submit(self, new: Submission | Order) -> None:
        """Queue a request; nothing is started or kept when it is refused."""
        order = new if isinstance(new, Order) else self.prepare(new)
        if order.id in self._orders:
            raise OptionError(f"request id {order.id!r} is taken by a request that has not finished; choose another")
        if not self.busy:
            self._counted, self._active_since = time.thread_time(), time.monotonic()
            self.moved_at = self._active_since
        for index, job in enumerate(order.jobs):
            try:
                self.scheduler.add(job.request)
            except PenstockError:
                for other in order.jobs[:index]:
                    self.scheduler.abort(other.request.id)
                raise
        new = order.submission
        limits = (None if each is None else new.arrival + each for each in (new.queue_timeout, new.timeout))
        self._deadlines.add(order.id, *limits)
        self._orders[order.id] = dict.fromkeys(job.request.id for job in order.jobs)
        self._live |= {job.request.id: job for job in order.jobs}

    def abort(self, request_id: str, reason: FinishReason = "abort", index: int | None = None) -> None:
        """End a request, or the sampled text of that index alone, now, with what it has; unknown ones have ended."""
        for each in tuple(self._orders.get(request_id, ())):
            job = self._live.get(each)
            if job is None or (index is not None and job.index != index):
                continue
            if event := self.scheduler.abort(each, reason):
                self._handle(event)

    def step(self) -> bool:
        """Launch the next batch if there is one, then take the oldest result that is due. False: nothing to do."""
        active = self.busy  # else the time since the last step was nobody's
        for request_id in self._deadlines.due(time.monotonic()) if len(self._deadlines) else ():
            self.abort(request_id, "timeout")
        plan = self.scheduler.schedule() if self.scheduler.can_schedule else None
        if plan is not None:
            self._launch(plan)
        if self._in_flight and (plan is None or not self.scheduler.can_schedule):
            self.backend.meanwhile()
            self._retire(*self._in_flight.popleft())
        if active:
            self._count_active()
        return plan is not None or bool(self._in_flight)

    def close(self) -> None:
        """Free the device, and end what compiles grammars. Nothing may be running."""
        self._intake.close()
        self._filler.close()
        self.backend.close()

    def fail_all(self, error: PenstockError) -> None:
        """End every request with an error: the device is gone."""
        for job in tuple(self._live.values()):
            if job.request.id in self._live:  # else it ended with a text of the same order
                self._fail(job, error)

    def snapshot(self) -> dict[str, Any]:
        """All counters by name: what `LLM.stats` gives, whose docstring says what the less plain ones mean."""
        groups = [group.name for group in self.engine.groups]
        return snapshot(self.stats, self.scheduler, self.kv, self.backend, groups, self._roof is not None)

    def _launch(self, plan: StepPlan) -> None:
        if self.log is not None:
            self.log.launching(plan)
        if self.recorder is not None:
            self.recorder(plan)
        launched, slow = time.monotonic(), self.backend.slow_steps
        try:
            if plan.admitted and self.engine.encoder is not None:
                self._read_sources(plan)
            upload = self._encoder.encode(plan, self._source)
            if plan.saved:
                self.backend.save_blocks(plan.saved)
            if plan.restored:
                self.backend.restore_blocks(plan.restored)
            if plan.retabled:
                self.backend.fork([(fork.parent, fork.slot) for fork in plan.retabled], plan.copies)
            tail = self._tail(plan)
            ticket = self.backend.launch(upload, plan.num_tokens, plan.num_rows, plan.num_logits, tail)
        except Exception as error:  # the step's border: it fails its own requests, and no others
            self._failing.clear()
            self._failed(plan, error)
            return
        if self.log is not None:
            self.log.launched()
        self._in_flight.append((plan, ticket, launched if self.backend.slow_steps == slow else None))
        self._end_failing()
        for admission in plan.admitted:
            if job := self._job(admission.request):
                job.stream.admit(launched)
                self._deadlines.admitted(job.order_id)
        stats, now = self.stats, time.thread_time()
        stats.host_seconds += now - self._counted
        stats.host_steps += 1
        stats.steps += 1
        stats.controlled_steps += plan.controlled
        self._counted = now

    def _read_sources(self, plan: StepPlan) -> None:
        """Let an encoder read what it has to of those who are admitted, at once, before the step that they join."""
        upload = self._encoder.encode_sources(plan.admitted, self._source)
        self.backend.encode(upload, sum(len(each.request.source) for each in plan.admitted), len(plan.admitted))

    def _job(self, request: Request) -> Job | None:
        """Of a request in a plan, unless it has ended."""
        job = self._live.get(request.id)
        return job if job is not None and job.is_of(request) else None

    def _source(self, request: Request) -> Source:
        return self._live[request.id].source

    def _tail(self, plan: StepPlan) -> Tail:
        """What the step does behind its logits."""
        if not plan.controlled:
            return PLAIN_TAIL
        sampling = zip(plan.sampling, plan.sample_rows, strict=True)
        every = ((row, self._job(request)) for request, row in sampling if request.controlled)
        jobs = [(row, job) for row, job in every if job is not None]
        rewritten = {row: job for row, job in jobs if job.processes}
        held = [(row, job, job.guide) for row, job in jobs if job.guide is not None]
        self.stats.processor_steps += bool(rewritten)
        self.stats.guided_steps += bool(held)
        return Tail(
            True,
            tuple(rewritten),
            lambda row, logits: self._process(rewritten[row], logits),
            (lambda bits: self._mask(held, bits)) if held else None,
        )

    def _mask(self, held: Sequence[tuple[int, Job, Guide]], bits: Any) -> Masks:
        """Once the forward is launched: the host learns the tokens of the step before it, and so which may be next."""
        unread = self._read_ahead()
        asked = [(guide, job.request.output, unread.get(job.request, ())) for _, job, guide in held]
        for (_, job, _), error in zip(held, self._filler.fill(asked, bits.numpy()), strict=True):
            if error is not None:
                told = SamplingError(f"the grammar of {job.order_id} failed: {_said(error)}")
                self._failing.append((job, error if isinstance(error, PenstockError) else told))
        return Masks([row for row, _, _ in held], [row for row, job, _ in held if job.is_scored], bits)

    def _read_ahead(self) -> dict[Request, list[int]]:
        """Wait for all that is in flight; the tokens that requests get of it, which the scheduler hears of later."""
        found: dict[Request, list[int]] = {}
        for plan, ticket, _ in self._in_flight:
            if ticket.number not in self._early:
                self._early[ticket.number] = self.backend.read(ticket)
            tokens = self._early[ticket.number]
            for request, row in zip(plan.sampling, plan.sample_rows, strict=True):
                found.setdefault(request, []).append(tokens[row])
        return found

    def _process(self, job: Job, logits: Any) -> Any:
        """A row's logits after the request's own functions; as they were, where those fail."""
        try:
            return job.process(logits.clone())
        except BaseException as error:  # the request's border: nothing that it raises may end this thread
            self._failing.append((job, SamplingError(f"a logits processor of {job.order_id} failed: {_said(error)}")))
            return logits

    def _end_failing(self) -> None:
        while self._failing:
            self._fail(*self._failing.pop())

    def _observe(self, plan: StepPlan, launched: float | None) -> None:
        """What the step took: from its launch, or from the end of the step before; of one off the fast path nothing is
        said."""
        now = time.monotonic()
        if launched is not None:
            took = now - max(launched, self._read_at)
            self.stats.device_seconds += took
            if self._roof is not None:
                self.stats.roof_seconds += self._roof.seconds(*plan.work)
            if self._pace is not None:
                self._pace.observe(plan.num_tokens, plan.num_rows, took)
        self._read_at = now
        self.num_failures = 0
        self._moved(now)

    def _moved(self, now: float) -> None:
        self.num_moves += 1
        self.moved_at = now

    def _count_active(self) -> None:
        """The time since it was counted last belongs to the requests there are."""
        now = time.monotonic()
        self.stats.active_seconds += now - self._active_since
        self._active_since = now

    def _retire(self, plan: StepPlan, ticket: Ticket, launched: float | None) -> None:
        try:
            early = self._early.pop(ticket.number, None)
            tokens = self.backend.read(ticket) if early is None else early
        except Exception as error:  # as above
            self._failed(plan, error)
            return
        self._counted = time.thread_time()
        if self.log is not None:
            self.log.read(plan)
        self._observe(plan, launched)
        found: Sequence[Sequence[Candidate]] = ()
        if plan.controlled:
            scores = self.backend.scores(ticket)
            keep_scores(plan, scores, tokens, self._job)
            found = candidates_of(plan, scores)
            tokens = [tokens[row] for row in plan.sample_rows]
        events = self.scheduler.retire(plan.step_id, tokens, found)
        for event in events:
            self._handle(event)

    def _failed(self, plan: StepPlan, error: Exception) -> None:
        if self.log is not None:
            self.log.failed(plan)
        self.num_failures += 1
        self._moved(time.monotonic())
        failure = ExecutorError(f"step {plan.step_id} failed and ended its {plan.num_rows} requests: {error}")
        failure.__cause__ = error
        for event in self.scheduler.fail(plan.step_id, failure):
            self._handle(event)

    def _handle(self, event: Event) -> None:
        """News of a request to its caller. Whatever a request's own text or sink raises ends that request alone."""
        live = self._live.get(event.request_id)
        if live is None:
            return
        try:
            self._tell(live, event)
        except Exception as error:  # the request's border
            self._fail(live, ExecutorError(f"request {live.order_id} failed while its output was made: {_said(error)}"))

    def _tell(self, live: Job, event: Event) -> None:
        now, stopped = time.monotonic(), False
        if event.token is not None and isinstance(live.stream, Stream):
            stopped = live.stream.add(event.token, now)
        if stopped and event.finish_reason is None:
            self.scheduler.abort(event.request_id, reason="stop")
        if not stopped and event.finish_reason is None:
            if live.streaming:
                live.tell()
            return
        if isinstance(event.error, PenstockError):
            self._fail(live, event.error)
            return
        self._forget(live)
        live.stream.end(event.finish_reason or "stop", now)
        if live.stream.index == 0:
            self.stats.requests += 1
            self.stats.prompt_tokens += len(live.request.given)
        live.tell()

    def _fail(self, live: Job, error: PenstockError) -> None:
        """End an order, all its texts, with an error."""
        if self._live.get(live.request.id) is not live:
            return
        for each in tuple(self._orders.get(live.order_id, ())):
            self.scheduler.abort(each)
            self._forget(self._live[each])
        _deliver(live, error)

    def _forget(self, job: Job) -> None:
        del self._live[job.request.id]
        left = self._orders[job.order_id]
        del left[job.request.id]
        if not left:
            del self._orders[job.order_id]
            self._deadlines.remove(job.order_id)


def _kv_manager(engine: Engine, backend: Backend, reuse: bool) -> KvManager:
    """Pools as large as the backend's; prefixes are not found again where there is state besides."""
    size, hosts = engine.profile.block_size, backend.host_blocks
    pools = [BlockPool(count, size, index) for index, count in enumerate(backend.num_blocks)]
    pairs = zip(pools, engine.groups, strict=True)
    tables = [Tables(pool, group.window, group.fixed, hosts) for pool, group in pairs]
    return KvManager(tables, reuse and not engine.besides, bool(engine.by_slot))


def _said(error: BaseException) -> str:
    """Its type and text; an error of a caller's own may have none."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _deliver(live: Job, error: PenstockError) -> None:
    """Tell a caller that its request failed; a caller who cannot be told has gone, and nobody else must suffer."""
    with suppress(Exception):
        live.sink(error)
