"""Who occupies which slot, and until when."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Set

from penstock.runtime.schedule.batch import Fork, StepPlan
from penstock.runtime.schedule.request import Request


class Slots:
    """Requests by slot. Those of `leaving` have finished or are preempted, and wait for the steps in flight."""

    def __init__(self, count: int) -> None:
        self.occupied: dict[int, Request] = {}  # in order of admission; those that leave too
        self.prompts: dict[int, Request] = {}  # of them, those with a part of their prompt in no step yet
        self.leaving: dict[int, Request] = {}
        self.spoiled: set[int] = set()  # of those that leave, the ones that a failed step should have written to
        self.forked: dict[int, Fork] = {}  # slots that got another's blocks, and no step has told the device
        self.count = count
        self._free = list(range(count))  # a heap, so that slots in use stay dense at the low end

    @property
    def num_free(self) -> int:
        return len(self._free)

    def seat(self, request: Request) -> int:
        """Give a request a slot; the caller has asked `num_free`."""
        slot = request.slot = heapq.heappop(self._free)
        self.occupied[slot] = request
        return slot

    def staying(self) -> list[Request]:
        """In order of admission."""
        return [request for slot, request in self.occupied.items() if slot not in self.leaving]

    def leave(self, request: Request) -> bool:
        """No step will take a token of it any more. Whether a part of its prompt was in no step."""
        slot = request.slot
        assert slot is not None
        self.leaving[slot] = request
        self.forked.pop(slot, None)
        return self.prompts.pop(slot, None) is not None

    def idle(self, in_flight: Iterable[StepPlan]) -> list[Request]:
        """Those that leave and that no step touches, nor any beam of the same group."""
        if not self.leaving:
            return []
        touched = {slot for plan in in_flight for slot in plan.slots}
        return [r for r in self.leaving.values() if not any(member.slot in touched for member in r.members)]

    def vacate(self, request: Request) -> bool:
        """Its slot is free. Whether all that should have been written there was."""
        slot, request.slot = request.slot, None
        assert slot is not None
        del self.occupied[slot], self.leaving[slot]
        heapq.heappush(self._free, slot)
        written = slot not in self.spoiled
        self.spoiled.discard(slot)
        return written

    def check(self, holding: Set[int]) -> None:
        """Prove that every slot is free or occupied once, and that exactly the occupied ones hold blocks."""
        every = sorted([*self._free, *self.occupied])
        assert every == list(range(self.count)), f"free {self._free}, occupied {[*self.occupied]}"
        assert holding == self.occupied.keys(), f"blocks of {holding}, occupied {[*self.occupied]}"
        prompts = {request.slot for request in self.staying() if request.in_prompt()}
        finished = {slot for slot, request in self.occupied.items() if request.finish_reason}
        assert prompts == self.prompts.keys(), f"in their prompt {prompts}, listed {[*self.prompts]}"
        assert finished | self.spoiled <= self.leaving.keys() and self.leaving.keys() <= self.occupied.keys()
        assert self.leaving.keys().isdisjoint(self.forked), "a slot that leaves is to be told of a fork"
