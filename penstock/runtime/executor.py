"""The loop's body: the only place where schedule, KV, step and sampling meet.

`step` plans and launches the next batch, then takes the tokens of the oldest one in flight: the host always lags the
device, and its own work hides behind the device's. One thread calls everything here.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from penstock.engine.manifest import Engine
from penstock.errors import ExecutorError, OptionError, PenstockError, PromptError
from penstock.runtime.kv.blocks import BlockPool, KvManager
from penstock.runtime.output import Stream
from penstock.runtime.requests import RequestOutput, SamplingParams, resolve
from penstock.runtime.schedule.batch import Event, StepPlan
from penstock.runtime.schedule.request import Request
from penstock.runtime.schedule.scheduler import Limits, Scheduler
from penstock.runtime.step import Backend, Ticket
from penstock.runtime.upload import Sampler, encode
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
class _Live:
    """A request that has not ended, as the executor keeps it beside the scheduler's record."""

    stream: Stream
    sink: Sink
    streaming: bool
    sampler: Sampler


@dataclass
class Stats:
    """Counters since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    requests: int = 0


class Executor:
    """Runs submissions to their end. Raises PromptError and the like from `submit`, before any work."""

    def __init__(
        self, engine: Engine, backend: Backend, tokenizer: Tokenizer | None, limits: Limits | None = None
    ) -> None:
        """`limits` within the engine's profile; None: the profile's own."""
        profile = engine.profile
        self.engine, self.backend, self.tokenizer = engine, backend, tokenizer
        self.kv = KvManager(BlockPool(backend.num_blocks, profile.block_size))
        limits = limits or Limits(profile.max_batch_size, profile.max_num_tokens, profile.max_seq_len)
        self.scheduler = Scheduler(replace(limits, max_steps_in_flight=backend.steps_in_flight), self.kv)
        self.stats = Stats()
        self._rope = ModelSpec.from_json(dict(engine.spec)).request_rope
        self._eos = frozenset(engine.tokens.get("eos", ())) | frozenset(tokenizer.eos_token_ids if tokenizer else ())
        self._live: dict[str, _Live] = {}
        self._in_flight: deque[tuple[StepPlan, Ticket]] = deque()

    @property
    def busy(self) -> bool:
        return self.scheduler.has_work

    def submit(self, new: Submission) -> None:
        """Queue a request; nothing is started or kept when it is refused."""
        if new.id in self._live:
            raise OptionError(f"request id {new.id!r} is taken by a request that has not finished; choose another")
        params, notes = resolve(new.params, self.engine.tokens.get("generation", {}))
        check_prompt(new.prompt_token_ids, self.engine.vocab_size)
        assert params.max_tokens is not None
        request = Request(
            new.id, new.prompt_token_ids, params.max_tokens, self.scheduler.limits.max_seq_len, self._eos,
            frozenset(params.stop_token_ids), params.ignore_eos,
        )  # fmt: skip
        stream = Stream(request, new.prompt, params, new.arrival, self.tokenizer, notes)
        live = _Live(stream, new.sink, new.streaming, self._sampler(params, request))
        self.scheduler.add(request)
        self._live[new.id] = live

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

    def _launch(self, plan: StepPlan) -> None:
        live = {row.request_id: self._live.get(row.request_id) for row in plan.rows}
        prompts = {name: each.stream.request.prompt if each else () for name, each in live.items()}  # a ghost has none
        samplers = {name: each.sampler for name, each in live.items() if each}
        try:
            upload = encode(plan, self.engine.profile.slots, samplers, prompts)
            ticket = self.backend.launch(upload, plan.num_tokens, len(plan.rows), plan.num_logits)
        except Exception as error:  # the step's border: it fails its own requests, and no others
            self._failed(plan, error)
            return
        self._in_flight.append((plan, ticket))
        self.stats.steps += 1

    def _retire(self, plan: StepPlan, ticket: Ticket) -> None:
        try:
            tokens = self.backend.read(ticket)
        except Exception as error:  # as above
            self._failed(plan, error)
            return
        for event in self.scheduler.retire(plan.step_id, dict(zip(plan.sampling_slots, tokens, strict=True))):
            self._handle(event)

    def _failed(self, plan: StepPlan, error: Exception) -> None:
        ids = ", ".join(row.request_id for row in plan.rows)
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

    def _tell(self, live: _Live, event: Event) -> None:
        now, stopped = time.monotonic(), False
        if event.token is not None:
            self.stats.generated_tokens += 1
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
        self.stats.prompt_tokens += len(live.stream.request.prompt)
        live.sink(event.error if isinstance(event.error, PenstockError) else live.stream.output())

    def _drop(self, event: Event, error: PenstockError) -> None:
        if live := self._live.pop(event.request_id, None):
            if event.finish_reason is None:
                self.scheduler.abort(event.request_id)
            _deliver(live, error)

    def _sampler(self, params: SamplingParams, request: Request) -> Sampler:
        """top_k 0 or less is off. The rope of a model that asks for it is fixed here, by the length it may reach."""
        assert params.temperature is not None and params.top_k is not None and params.top_p is not None
        freqs = inverse_frequencies(self._rope, request.max_length) if self._rope else ()
        return Sampler(params.temperature, max(params.top_k, 0), params.top_p, fold_seed(params.seed), tuple(freqs))


def fold_seed(seed: int | None, sample: int = 0) -> int:
    """31 bits from a caller's seed and the index of the sample; fresh ones where no seed was given."""
    if seed is None:
        return secrets.randbits(31)
    return int.from_bytes(hashlib.sha256(f"{seed}.{sample}".encode()).digest()[:4], "big") >> 1


def _deliver(live: _Live, error: PenstockError) -> None:
    """Tell a caller that its request failed; a caller who cannot be told has gone, and nobody else must suffer."""
    with suppress(Exception):
        live.sink(error)


def check_prompt(ids: Sequence[int], vocab_size: int) -> None:
    """Raises PromptError for an empty prompt, or an id outside the vocabulary."""
    if not ids:
        raise PromptError("the prompt is empty; give at least one token")
    for index, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool):
            raise PromptError(f"token id {token!r} at position {index} is a {type(token).__name__}; give integers")
        if not 0 <= token < vocab_size:
            raise PromptError(
                f"token id {token} at position {index} is outside the vocabulary of {vocab_size}: "
                f"ids go from 0 to {vocab_size - 1}"
            )
