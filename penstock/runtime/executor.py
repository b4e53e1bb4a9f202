"""The loop's body: the only place where schedule, KV, step and sampling meet.

`step` plans and launches the next batch, then takes the tokens of the oldest one in flight: the host always lags the
device, and its own work hides behind the device's. One thread calls everything here.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from penstock.engine.manifest import Engine
from penstock.errors import ExecutorError, OptionError, PenstockError
from penstock.ir.ops.state import FIELDS
from penstock.runtime.kv.blocks import BlockPool
from penstock.runtime.kv.manager import KvManager
from penstock.runtime.output import Stream
from penstock.runtime.prompt import prompt_numbers
from penstock.runtime.requests import RequestOutput, Resolver, SamplingParams
from penstock.runtime.schedule.batch import Event, StepPlan
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.request import Request
from penstock.runtime.schedule.scheduler import Scheduler
from penstock.runtime.stats import Stats
from penstock.runtime.step import Backend, Ticket
from penstock.runtime.steplog import StepLog
from penstock.runtime.upload import Encoder, Numbers, Source, slot_numbers
from penstock.spec import ModelSpec, inverse_frequencies
from penstock.text.tokenizer import Tokenizer

Sink = Callable[[RequestOutput | PenstockError], None]


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as it arrives. `sink` gets every output if `streaming`, else the last; or the error that ended it."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    sink: Sink
    prompt: str | None = None
    streaming: bool = False
    arrival: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Job:
    """A submission made ready: what the executor keeps beside the scheduler's record until the request ends."""

    request: Request
    stream: Stream
    source: Source
    sink: Sink
    streaming: bool


class Executor:
    """Runs submissions to their end. Raises PromptError and the like from `submit`, before any work."""

    def __init__(
        self,
        engine: Engine,
        backend: Backend,
        tokenizer: Tokenizer | None,
        limits: Limits | None = None,
        reuse: bool = True,
    ) -> None:
        """`limits` within the engine's profile; None: the profile's own. `reuse`: of the KV of equal prefixes."""
        profile = engine.profile
        self.engine, self.backend, self.tokenizer = engine, backend, tokenizer
        self.kv = KvManager(BlockPool(backend.num_blocks, profile.block_size), reuse)
        limits = limits or Limits(profile.max_batch_size, profile.max_num_tokens, profile.max_seq_len)
        self.scheduler = Scheduler(replace(limits, max_steps_in_flight=backend.steps_in_flight), self.kv)
        self.stats = Stats()
        self._resolver = Resolver(engine.tokens.get("generation", {}))
        self._encoder = Encoder(profile.slots, profile.upload_size)
        self._rope = ModelSpec.from_json(dict(engine.spec)).request_rope
        self._eos = frozenset(engine.tokens.get("eos", ())) | frozenset(tokenizer.eos_token_ids if tokenizer else ())
        self._live: dict[str, Job] = {}
        self._in_flight: deque[tuple[StepPlan, Ticket]] = deque()
        self.log: StepLog | None = None  # of every step, where somebody measures
        self._counted = 0.0  # the thread's CPU time up to which the host's is counted, or was the device's

    @property
    def busy(self) -> bool:
        return self.scheduler.has_work

    def prepare(self, new: Submission) -> Job:
        """Check a submission and work out all that needs neither the device nor other requests; on any thread."""
        params, notes = self._resolver.resolve(new.params)
        numbers = prompt_numbers(new.prompt_token_ids, self.engine.vocab_size)
        assert params.max_tokens is not None
        has_text = params.detokenize and self.tokenizer is not None
        request = Request(
            new.id, new.prompt_token_ids, params.max_tokens, self.scheduler.limits.max_seq_len, self._eos,
            frozenset(params.stop_token_ids), params.ignore_eos, hears_all=new.streaming or has_text,
        )  # fmt: skip
        self.scheduler.refuse_impossible(request)
        slot = self._slot(params, request)
        request.salt = slot[len(FIELDS) :].tobytes()  # its rope, where that is its own
        self.scheduler.name_blocks(request)
        stream = Stream(request, new.prompt, params, new.arrival, self.tokenizer, notes)
        return Job(request, stream, Source(numbers, slot), new.sink, new.streaming)

    def submit(self, new: Submission | Job) -> None:
        """Queue a request; nothing is started or kept when it is refused."""
        job = new if isinstance(new, Job) else self.prepare(new)
        if job.request.id in self._live:
            raise OptionError(
                f"request id {job.request.id!r} is taken by a request that has not finished; choose another"
            )
        if not self.busy:
            self._counted = time.thread_time()
        self.scheduler.add(job.request)
        self._live[job.request.id] = job

    def abort(self, request_id: str) -> None:
        """End a request now, with what it has; unknown ids have ended already."""
        if request_id in self._live and (event := self.scheduler.abort(request_id)):
            self._handle(event)

    def step(self) -> bool:
        """Launch the next batch if there is one, then take the oldest result that is due. False: nothing to do."""
        plan = self.scheduler.schedule() if self.scheduler.can_schedule else None
        if plan is not None:
            self._launch(plan)
        if self._in_flight and (plan is None or not self.scheduler.can_schedule):
            self._retire(*self._in_flight.popleft())
        return plan is not None or bool(self._in_flight)

    def fail_all(self, error: PenstockError) -> None:
        """End every request with an error: the device is gone."""
        for request_id in tuple(self._live):
            _deliver(self._live.pop(request_id), error)

    def snapshot(self) -> dict[str, Any]:
        """All counters by name: what `LLM.stats` gives, whose docstring says what the less plain ones mean."""
        stats, scheduler, backend, pool = self.stats, self.scheduler, self.backend, self.kv.pool
        counters = scheduler.counters
        return {
            "steps": stats.steps,
            "requests": stats.requests,
            "prompt_tokens": stats.prompt_tokens,
            "generated_tokens": stats.generated_tokens,
            "host_us_per_step": stats.host_us_per_step,
            "host_seconds": stats.host_seconds,
            "host_steps": stats.host_steps,
            "requests_running": scheduler.num_running,
            "requests_waiting": scheduler.num_waiting,
            "preemptions": counters.preemptions,
            "prefix_cache_queries": counters.asked_tokens,
            "prefix_cache_hits": counters.reused_tokens,
            "prefix_cache_evictions": pool.num_evicted,
            "kv_cache_usage": self.kv.usage,
            "kv_cache_waste": scheduler.waste(),
            "kv_blocks": pool.num_usable,
            **backend.counters(),
            "load_seconds": dict(backend.load_seconds),
            "memory": dict(backend.memory),
        }

    def _launch(self, plan: StepPlan) -> None:
        if self.log is not None:
            self.log.launching(plan)
        try:
            upload = self._encoder.encode(plan, self._source)
            ticket = self.backend.launch(upload, plan.num_tokens, plan.num_rows, plan.num_logits)
        except Exception as error:  # the step's border: it fails its own requests, and no others
            self._failed(plan, error)
            return
        if self.log is not None:
            self.log.launched()
        self._in_flight.append((plan, ticket))
        for admission in plan.admitted:
            self._live[admission.request.id].stream.admit(time.monotonic())
        stats, now = self.stats, time.thread_time()
        stats.host_seconds += now - self._counted
        stats.host_steps += 1
        stats.steps += 1
        self._counted = now

    def _source(self, request: Request) -> Source:
        """Of a request that was preempted, what it had generated is prompt as well."""
        source = self._live[request.id].source
        if request.goal == request.prompt_length:
            return source
        known = [*request.prompt, *request.output[: request.goal - request.prompt_length]]
        return Source(np.array(known, np.int32), source.slot)

    def _retire(self, plan: StepPlan, ticket: Ticket) -> None:
        try:
            tokens = self.backend.read(ticket)
        except Exception as error:  # as above
            self._failed(plan, error)
            return
        self._counted = time.thread_time()
        if self.log is not None:
            self.log.read(plan)
        events = self.scheduler.retire(plan.step_id, tokens)
        self.stats.generated_tokens = self.scheduler.num_generated
        for event in events:
            self._handle(event)

    def _failed(self, plan: StepPlan, error: Exception) -> None:
        if self.log is not None:
            self.log.failed(plan)
        ids = ", ".join(request.id for request in plan.requests)
        failure = ExecutorError(f"step {plan.step_id} failed and ended requests {ids}: {error}")
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
            self._drop(event, ExecutorError(f"request {event.request_id} failed while its output was made: {error}"))

    def _tell(self, live: Job, event: Event) -> None:
        now, stopped = time.monotonic(), False
        if event.token is not None:
            stopped = live.stream.add(event.token, now)
        if stopped and event.finish_reason is None:
            self.scheduler.abort(event.request_id, reason="stop")
        if not stopped and event.finish_reason is None:
            if live.streaming:
                live.sink(live.stream.output())
            return
        del self._live[event.request_id]
        live.stream.end(event.finish_reason or "stop", now)
        self.stats.requests += 1
        self.stats.prompt_tokens += live.request.prompt_length
        live.sink(event.error if isinstance(event.error, PenstockError) else live.stream.output())

    def _drop(self, event: Event, error: PenstockError) -> None:
        if live := self._live.pop(event.request_id, None):
            if event.finish_reason is None:
                self.scheduler.abort(event.request_id)
            _deliver(live, error)

    def _slot(self, params: SamplingParams, request: Request) -> Numbers:
        """top_k 0 or less is off. The rope of a model that asks for it is fixed here, by the length it may reach."""
        assert params.temperature is not None and params.top_k is not None and params.top_p is not None
        freqs = inverse_frequencies(self._rope, request.max_length) if self._rope else ()
        return slot_numbers(
            params.temperature, max(params.top_k, 0), params.top_p, fold_seed(params.seed), tuple(freqs)
        )


def fold_seed(seed: int | None, sample: int = 0) -> int:
    """31 bits from a caller's seed and the index of the sample; fresh ones where no seed was given."""
    if seed is None:
        return secrets.randbits(31)
    return int.from_bytes(hashlib.sha256(f"{seed}.{sample}".encode()).digest()[:4], "big") >> 1


def _deliver(live: Job, error: PenstockError) -> None:
    """Tell a caller that its request failed; a caller who cannot be told has gone, and nobody else must suffer."""
    with suppress(Exception):
        live.sink(error)
