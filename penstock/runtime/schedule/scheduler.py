"""Which tokens run in the next step: first come, first served, over slots, KV blocks and a token budget.

Pure: no clock, no tensors. Up to `max_steps_in_flight` steps are planned ahead of the tokens they sample. When step
n + 1 is planned, step n's tokens are unknown, only their number is. So a request that step n turns out to have ended
may still have a row in step n + 1: a ghost, whose token is dropped, and whose slot and blocks stay its own until no
step in flight touches them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from penstock.errors import OptionError, PromptError
from penstock.runtime.kv.blocks import KvManager
from penstock.runtime.schedule.batch import Admission, Event, Row, StepPlan
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


@dataclass
class _Draft:
    """A step being filled; `budget` tokens may still be added."""

    budget: int
    rows: list[Row] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)

    def give(self, request: Request) -> None:
        count = min(request.num_wanted, self.budget)
        if not count:
            return
        assert request.slot is not None
        start = request.launch(count)
        self.rows.append(Row(request.slot, request.id, start, count, not request.in_prompt()))
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
        self._in_flight: dict[int, StepPlan] = {}
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
        self._refuse_impossible(request)
        self._live[request.id] = self._waiting[request.id] = request

    def _refuse_impossible(self, request: Request) -> None:
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
        draft = _Draft(self.limits.max_num_tokens)
        running = [request for request in self._slots.values() if not request.finish_reason]
        # The sort is stable: decode rows, then prompts under way, each in order of admission.
        for request in sorted(running, key=Request.in_prompt):
            draft.give(request)
        while draft.budget and (admission := self._admit()):
            draft.admitted.append(admission)
            draft.give(admission.request)
        assert draft.rows or self._in_flight or not self.has_work, "work is left and nothing can run"
        return self._plan(draft) if draft.rows else None

    def _admit(self) -> Admission | None:
        """Give the oldest waiting request a slot and all blocks it may ever need, so that nothing is preempted."""
        request = next(iter(self._waiting.values()), None)
        if request is None or not self._free_slots or not self.kv.fits_now(request.max_length):
            return None  # later arrivals do not overtake it, or a long request would starve
        del self._waiting[request.id]
        request.slot = heapq.heappop(self._free_slots)
        self._slots[request.slot] = request
        return Admission(request.slot, request, self.kv.reserve(request.slot, request.max_length))

    def _plan(self, draft: _Draft) -> StepPlan:
        plan = StepPlan(self._next_step, tuple(draft.rows), tuple(draft.admitted))
        self._in_flight[plan.step_id] = plan
        self._next_step += 1
        return plan

    def retire(self, step_id: int, tokens: Mapping[int, int]) -> tuple[Event, ...]:
        """Learn the token of each sampling slot of the oldest step in flight; events in row order, ghosts left out."""
        assert step_id == next(iter(self._in_flight), None), f"step {step_id} is not the oldest of {[*self._in_flight]}"
        plan = self._in_flight.pop(step_id)
        assert tokens.keys() == set(plan.sampling_slots), f"tokens of {[*tokens]}, sampled {plan.sampling_slots}"
        events = tuple(self._accept(request, tokens[slot]) for slot, request in self._unfinished(plan.sampling_slots))
        self._release_idle(row.slot for row in plan.rows)
        return events

    def fail(self, step_id: int, error: Exception) -> tuple[Event, ...]:
        """A step in flight died (any: a launch fails while an older step runs); its unfinished requests end so too."""
        plan = self._in_flight.pop(step_id)
        slots = [row.slot for row in plan.rows]
        events = tuple(self._end(request, "error", error=error) for _, request in self._unfinished(slots))
        self._release_idle(slots)
        return events

    def abort(self, request_id: str, reason: FinishReason = "abort") -> Event | None:
        """End a request from outside at any time; None if it has ended already. A stop string ends it with "stop"."""
        request = self._live.get(request_id)
        if request is None:
            return None
        event = self._end(request, reason)
        if request.slot is not None:
            self._release_idle([request.slot])
        return event

    def _unfinished(self, slots: Iterable[int]) -> list[tuple[int, Request]]:
        occupied = [(slot, self._slots[slot]) for slot in slots]
        return [(slot, request) for slot, request in occupied if not request.finish_reason]

    def _accept(self, request: Request, token: int) -> Event:
        reason = request.accept(token)
        return Event(request.id, token, None) if reason is None else self._end(request, reason, token)

    def _end(
        self, request: Request, reason: FinishReason, token: int | None = None, error: Exception | None = None
    ) -> Event:
        del self._live[request.id]
        self._waiting.pop(request.id, None)
        request.finish_reason = reason
        return Event(request.id, token, reason, error)

    def _release_idle(self, slots: Iterable[int]) -> None:
        """Free those of `slots` whose request has finished and which no step in flight touches."""
        for slot in slots:
            request = self._slots[slot]
            if request.finish_reason and not any(slot in plan.slots for plan in self._in_flight.values()):
                del self._slots[slot]
                request.slot = None
                self.kv.free(slot)
                heapq.heappush(self._free_slots, slot)

    def check(self) -> None:
        """Prove that every slot is free or occupied once, and that exactly the occupied ones hold blocks."""
        self.kv.check()
        every = sorted([*self._free_slots, *self._slots])
        assert every == list(range(self.limits.max_batch_size)), f"free {self._free_slots}, occupied {[*self._slots]}"
        assert self.kv.slots == self._slots.keys(), f"blocks of {self.kv.slots}, occupied {[*self._slots]}"
        for plan in self._in_flight.values():
            assert plan.slots <= self._slots.keys(), f"step {plan.step_id} touches a free slot"
