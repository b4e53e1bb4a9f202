"""Which buckets are captured beside load: those that steps missed twice. Nothing of a device is needed for that."""

from __future__ import annotations

from penstock.runtime.graphs import Graphs, Kind

KEY, OTHER = (64, 8), (128, 8)


class Counted(Graphs):
    """Without a device: a capture is noted."""

    def __init__(self) -> None:
        self.larger, self._missed, self._due = 0, set(), {}
        self.captures: list[object] = []

    def capture(self, key: tuple[int, int], kind: Kind) -> None:
        self.captures.append((key, kind))
        self._missed.discard((key, kind))
        self._due.pop((key, kind), None)


def test_a_bucket_is_due_when_it_was_missed_twice() -> None:
    graphs = Counted()
    graphs._miss(KEY, Kind.WHOLE)
    graphs._miss(OTHER, Kind.WHOLE)
    assert not graphs.is_due and graphs.larger == 2
    graphs._miss(KEY, Kind.WHOLE)
    assert graphs.is_due and not graphs.capture_due()
    assert graphs.captures == [(KEY, Kind.WHOLE)]
    graphs._miss(KEY, Kind.WHOLE)  # as if it had never been missed
    assert not graphs.is_due
