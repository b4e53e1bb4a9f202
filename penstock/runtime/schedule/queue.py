"""Who waits, and in which order they are admitted."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

from penstock.runtime.schedule.request import Request

PATIENCE = 64  # admissions of later arrivals that the oldest request lets pass


class _Place(NamedTuple):
    """What waiting requests are sorted by: the lower priority number first, then the earlier arrival."""

    priority: int
    arrival: int


class WaitingQueue:
    """First come, first served within a priority. Nobody starves: when as many as `patience` of those that came later
    have been admitted before the oldest one, the oldest is first, whatever its priority.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        self._patience = patience
        self._places: list[_Place] = []  # sorted
        self._requests: dict[int, Request] = {}  # by arrival
        self._arrivals: list[int] = []  # a heap of them, and of some that have left
        self._oldest = -1  # arrival of the request that has waited longest
        self._overtaken = 0  # by so many since it is the oldest
        self.num_tokens = 0  # of all prompts that wait

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Request]:
        """In the order of admission; the queue may not change meanwhile."""
        impatient = self._overtaken >= self._patience
        if impatient:
            yield self._requests[self._oldest]
        for place in self._places:
            if not (impatient and place.arrival == self._oldest):
                yield self._requests[place.arrival]

    def add(self, request: Request) -> None:
        """A request that is preempted comes back with its old arrival, and so to its old place."""
        assert request.arrival not in self._requests, f"request {request.id} waits already"
        insort(self._places, _Place(request.priority, request.arrival))
        self._requests[request.arrival] = request
        heapq.heappush(self._arrivals, request.arrival)
        self.num_tokens += len(request.given)
        self._see_oldest()

    def remove(self, request: Request) -> None:
        """It is admitted (see `admit`) or ends."""
        place = _Place(request.priority, request.arrival)
        index = bisect_left(self._places, place)
        assert self._places[index] == place, f"request {request.id} does not wait"
        del self._places[index], self._requests[request.arrival]
        self.num_tokens -= len(request.given)
        self._see_oldest()

    def admit(self, request: Request) -> None:
        """It leaves the queue for a slot."""
        if request.arrival != self._oldest:
            self._overtaken += 1
        self.remove(request)

    def _see_oldest(self) -> None:
        """The oldest may be another now, which nobody has overtaken since."""
        while self._arrivals and self._arrivals[0] not in self._requests:
            heapq.heappop(self._arrivals)
        oldest = self._arrivals[0] if self._arrivals else -1
        if oldest != self._oldest:
            self._oldest, self._overtaken = oldest, 0
