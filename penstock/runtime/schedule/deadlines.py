"""Until when requests must be admitted, and until when they must end. No clock: moments are handed in."""

from __future__ import annotations

import heapq
from math import inf

SLACK = 64  # entries of requests that have left, which are not worth a new heap


class Deadlines:
    """The moments of live requests, the earliest first. Every call is O(log n), `add` to `remove` taken together.

    Moments are on any one scale, as of time.monotonic. Of a request that is preempted the wait counts no more: it was
    admitted in time.
    """

    def __init__(self) -> None:
        self._next: dict[str, float] = {}  # by id, what is due next
        self._ends: dict[str, float] = {}  # by id, what is due once it is admitted
        self._heap: list[tuple[float, str]] = []  # all of `_next`, and some that have changed or left

    def __len__(self) -> int:
        """Requests that have a moment left."""
        return len(self._next)

    def add(self, id: str, admit_by: float | None, end_by: float | None) -> None:
        """A new request; None: no such limit. Without any it need not be told of again, but may be."""
        assert id not in self._next, f"request {id} has its deadlines already"
        wait, end = (inf if moment is None else moment for moment in (admit_by, end_by))
        assert wait == wait and end == end, f"the deadlines of request {id} are no numbers"
        self._ends[id] = end
        self._expect(id, min(wait, end))

    def admitted(self, id: str) -> None:
        """It waits no longer."""
        if id in self._next and self._next[id] != self._ends[id]:
            self._expect(id, self._ends[id])

    def remove(self, id: str) -> None:
        """It has ended; unknown ids have ended already, or never had a deadline."""
        if self._next.pop(id, None) is not None:
            del self._ends[id]

    def due(self, now: float) -> list[str]:
        """Those whose moment has come, the earliest first; they are told once, and not kept."""
        found: list[str] = []
        while self._heap and self._heap[0][0] <= now:
            moment, id = heapq.heappop(self._heap)
            if self._next.get(id) == moment:
                self.remove(id)
                found.append(id)
        return found

    def next(self) -> float | None:
        """The earliest moment; None where there is none."""
        while self._heap and self._next.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _expect(self, id: str, moment: float) -> None:
        if moment == inf:
            self._next.pop(id, None)
            del self._ends[id]
            return
        self._next[id] = moment
        if len(self._heap) > 2 * len(self._next) + SLACK:
            self._heap = [(at, name) for name, at in self._next.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (moment, id))
