"""Which tokens run in the next step: first come, first served, over slots, KV blocks and a token budget.

Pure: no clock, no tensors. Up to `max_steps_in_flight` steps are planned ahead of the tokens they sample. When step
n + 1 is planned, step n's tokens are unknown, only their number is. So a request that step n turns out to have ended
may still have a row in step n + 1: a ghost, whose token is dropped, and whose slot and blocks stay its own until no
step in flight touches them.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.errors import OptionError, PromptError
from penstock.runtime.kv.blocks import KvManager
from penstock.runtime.schedule.batch import Admission, Chunk, Decoders, Event, StepPlan
from penstock.runtime.schedule.request import FinishReason, Request, Status


@dataclass(frozen=True)
class Limits:
    """Slots, tokens of one step, tokens of one sequence (prompt and output), steps planned ahead."""

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_steps_in_flight: int = 2

    def __post_init__(self) -> None:
        least = {"max_batch_size": 1, "max_num_tokens": 1, "max_seq_len": 2, "max_steps_in_flight": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise OptionError(f"{name}={getattr(self, name)} is too small; it must be at least {low}")
        # With a token for every slot, every decoding request moves in every step and no prompt can be starved by them.
        if self.max_num_tokens < self.max_batch_size:
            raise OptionError(
                f"max_num_tokens={self.max_num_tokens} is less than max_batch_size={self.max_batch_size}: a step must "
                f"hold a token of every running request; raise the first or lower the second"
            )


@dataclass(slots=True)
class _Draft:
    """The prompts' part of a step being filled; `budget` tokens may still be added."""

    budget: int
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)

    def give(self, request: Request) -> None:
        """As much of the request's prompt as the budget allows."""
        assert request.slot is not None and self.budget > 0
        count = min(request.prompt_length - request.num_computed, self.budget)
        start = request.launch(count)
        self.chunks.append(Chunk(request, request.slot, start, count, not request.in_prompt()))
        self.budget -= count


class Scheduler:
    """Waiting requests in order of arrival, running ones in order of admission, and the steps in flight.

    The caller's loop: `schedule`, launch the plan, then `retire` (or `fail`) the oldest step in flight with its tokens.
    """

    def __init__(self, limits: Limits, kv: KvManager) -> None:
        self.limits = limits
        self.kv = kv
        self._live: dict[str, Request] = {}  # not yet finished, by id
        self._waiting: dict[str, Request] = {}  # a queue that an abort can leave from the middle
        self._slots: dict[int, Request] = {}  # the occupied ones; finished requests too, while a step touches them
        self._free_slots = list(range(limits.max_batch_size))  # a heap, so that slots in use stay dense at the low end
        self._prompts: dict[int, Request] = {}  # of them, those with a part of their prompt in no step yet, by slot
        self._leaving: dict[int, Request] = {}  # of them, those that have finished
        self._decoders: Decoders | None = None  # None: somebody has joined or left
        self._in_flight: dict[int, StepPlan] = {}
        self.num_generated = 0  # tokens learnt, of all requests since the start
        self._next_step = 0

    @property
    def has_work(self) -> bool:
        """Whether a step is left to plan or to retire."""
        return bool(self._waiting or self._slots)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._live) - len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def can_schedule(self) -> bool:
        """Whether another step may be planned before one retires."""
        return len(self._in_flight) < self.limits.max_steps_in_flight

    def add(self, request: Request) -> None:
        """Queue a request. PromptError if it could never run, OptionError if its id is taken; nothing changes then."""
        assert request.status is Status.WAITING and not request.num_computed, f"request {request.id} was used before"
        assert request.max_tokens >= 1 and request.max_seq_len <= self.limits.max_seq_len, request
        if request.id in self._live:
            raise OptionError(f"request id {request.id!r} is taken by a request that has not finished; choose another")
        self.refuse_impossible(request)
        self._live[request.id] = self._waiting[request.id] = request

    def refuse_impossible(self, request: Request) -> None:
        """PromptError if it could never run. Reads nothing that changes, so that any thread may ask."""
        length, limit = len(request.prompt), request.max_seq_len
        if not length:
            raise PromptError(f"the prompt of request {request.id!r} is empty; give at least 1 token")
        if length > limit - 1:
            raise PromptError(
                f"the prompt of request {request.id!r} has {length} tokens, the limit is {limit - 1} (max_seq_len="
                f"{limit} less 1 to generate); shorten it or raise max_seq_len"
            )
        if not self.kv.fits_pool(request.max_length):
            pool = self.kv.pool
            raise PromptError(
                f"request {request.id!r} may become {request.max_length} tokens long ({length} of prompt and "
                f"{request.output_limit} to generate), and the whole KV pool holds {pool.num_usable * pool.block_size} "
                f"({pool.num_usable} blocks of {pool.block_size}); lower max_tokens, shorten the prompt, or raise "
                f"gpu_memory_utilization or max_gpu_bytes"
            )

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None when nothing can run before a step in flight retires (or at all)."""
        assert self.can_schedule, f"{self.num_in_flight} steps are in flight, retire one first"
        decoders = self._decoders or self._gather()
        draft = _Draft(self.limits.max_num_tokens - len(decoders.requests))
        if self._prompts or self._waiting:
            self._fill(draft)
        if not (decoders.requests or draft.chunks):
            assert self._in_flight or not self.has_work, "work is left and nothing can run"
            return None
        return self._plan(decoders, draft)

    def _gather(self) -> Decoders:
        """Who decodes from now on."""
        self._decoders = Decoders([r for r in self._slots.values() if r.finish_reason is None and r.decodes])
        return self._decoders

    def _fill(self, draft: _Draft) -> None:
        """Prompts under way, in order of admission, then those that wait, as far as the budget goes."""
        under_way = iter(tuple(self._prompts.values()))
        while draft.budget and (request := next(under_way, None)):
            draft.give(request)
        while draft.budget and (admission := self._admit()):
            draft.admitted.append(admission)
            draft.give(admission.request)

    def _admit(self) -> Admission | None:
        """Give the oldest waiting request a slot and all blocks it may ever need, so that nothing is preempted."""
        request = next(iter(self._waiting.values()), None)
        if request is None or not self._free_slots or not self.kv.fits_now(request.max_length):
            return None  # later arrivals do not overtake it, or a long request would starve
        del self._waiting[request.id]
        request.slot = heapq.heappop(self._free_slots)
        self._slots[request.slot] = self._prompts[request.slot] = request
        return Admission(request.slot, request, self.kv.reserve(request.slot, request.max_length))

    def _plan(self, decoders: Decoders, draft: _Draft) -> StepPlan:
        rounds = decoders.advance() if decoders.requests else 0
        plan = StepPlan(self._next_step, decoders, rounds, tuple(draft.chunks), tuple(draft.admitted))
        for chunk in plan.chunks:
            if chunk.samples:  # its prompt is done: it decodes from the next step on
                del self._prompts[chunk.slot]
                self._decoders = None
        if not decoders.steps_left:
            self._decoders = None
        self._in_flight[plan.step_id] = plan
        self._next_step += 1
        return plan

    def retire(self, step_id: int, tokens: Sequence[int]) -> tuple[Event, ...]:
        """Learn the tokens of the oldest step in flight, one for each request that samples; ghosts' are dropped.

        Events in row order; a request that does not hear all has one for its first token and one for its end.
        """
        assert step_id == next(iter(self._in_flight), None), f"step {step_id} is not the oldest of {[*self._in_flight]}"
        plan = self._in_flight.pop(step_id)
        assert len(tokens) == plan.num_logits, f"{len(tokens)} tokens, {plan.num_logits} were sampled"
        events = self._accept(plan.sampling, tokens)
        self._release_idle()
        return tuple(events)

    def _accept(self, requests: Sequence[Request], tokens: Sequence[int]) -> list[Event]:
        events, ghosts = [], 0
        for request, token in zip(requests, tokens, strict=True):
            if request.finish_reason is not None:
                ghosts += 1
                continue
            reason = request.accept(token)
            if reason is not None:
                events.append(self._end(request, reason, token))
            elif request.hears_all or len(request.output) == 1:
                events.append(Event(request.id, token, None))
        self.num_generated += len(tokens) - ghosts
        return events

    def fail(self, step_id: int, error: Exception) -> tuple[Event, ...]:
        """A step in flight died (any: a launch fails while an older step runs); its unfinished requests end so too."""
        plan = self._in_flight.pop(step_id)
        unfinished = [request for request in plan.requests if not request.finish_reason]
        events = tuple(self._end(request, "error", error=error) for request in unfinished)
        self._release_idle()
        return events

    def abort(self, request_id: str, reason: FinishReason = "abort") -> Event | None:
        """End a request from outside at any time; None if it has ended already. A stop string ends it with "stop"."""
        request = self._live.get(request_id)
        if request is None:
            return None
        event = self._end(request, reason)
        self._release_idle()
        return event

    def _end(
        self, request: Request, reason: FinishReason, token: int | None = None, error: Exception | None = None
    ) -> Event:
        del self._live[request.id]
        request.finish_reason = reason
        if request.slot is None:
            del self._waiting[request.id]
        else:
            self._leaving[request.slot] = request
            self._prompts.pop(request.slot, None)
            if request.decodes:  # otherwise it is not among the decoders, or has left them with its last launch
                self._decoders = None
        return Event(request.id, token, reason, error)

    def _release_idle(self) -> None:
        """Free the slots of finished requests that no step in flight touches."""
        for slot, request in tuple(self._leaving.items()):
            if not any(slot in plan.slots for plan in self._in_flight.values()):
                del self._slots[slot], self._leaving[slot]
                request.slot = None
                self.kv.free(slot)
                heapq.heappush(self._free_slots, slot)

    def check(self) -> None:
        """Prove that every slot is free or occupied once, and that exactly the occupied ones hold blocks."""
        self.kv.check()
        every = sorted([*self._free_slots, *self._slots])
        assert every == list(range(self.limits.max_batch_size)), f"free {self._free_slots}, occupied {[*self._slots]}"
        assert self.kv.slots == self._slots.keys(), f"blocks of {self.kv.slots}, occupied {[*self._slots]}"
        prompts = {slot for slot, r in self._slots.items() if not r.finish_reason and r.in_prompt()}
        finished = {slot for slot, r in self._slots.items() if r.finish_reason}
        assert prompts == set(self._prompts) and finished == set(self._leaving), "a slot is listed under another state"
        for plan in self._in_flight.values():
            assert plan.slots <= self._slots.keys(), f"step {plan.step_id} touches a free slot"
