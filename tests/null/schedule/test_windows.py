"""The scheduler over blocks that fall out of a window, by example."""

from __future__ import annotations

import pytest

from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.scheduler import Scheduler
from tests.null.kv.books import books
from tests.null.schedule.test_scheduler import planned, request, retire


@pytest.mark.parametrize(("window", "most"), [(0, 12), (1, 2), (5, 4), (6, 6)])
def test_long_texts_take_turns_only_where_they_keep_all(window: int, most: int) -> None:
    """Two texts of 10 blocks each, in a pool of 12."""
    s = Scheduler(Limits(2, 8, 64, 2), books(13, 4, window=window))
    for name in ("a", "b"):
        s.add(request(name, prompt=4, max_tokens=36))
    flight, used = [], []
    while s.has_work:
        if plan := s.schedule():
            flight.append(plan)
        used.append(s.kv.groups[0].pool.num_used)
        s.check()
        if plan is None or not s.can_schedule:
            retire(s, flight.pop(0))
    assert max(used) == most and (s.counters.preemptions > 0) == (window == 0)
    assert s.counters.generated_tokens == 72 and s.kv.groups[0].pool.num_used == 0


def test_who_read_a_block_of_a_failed_step_ends_though_it_has_given_it_back() -> None:
    s = Scheduler(Limits(4, 8, 64, 3), books(65, 4, window=4))
    for name in ("a", "b", "other"):
        s.add(request(name, prompt=12, salt=b"other" if name == "other" else b""))
    first, second = planned(s), planned(s)
    assert [row[1:4] for row in (*first.rows, *second.rows)] == [("a", 0, 8), ("a", 8, 4), ("b", 8, 4)]
    (admission,) = second.admitted
    assert admission.block_tables[0][:2] == (0, s.kv.groups[0].table(0)[1]), "of two blocks found it sees the second"
    third = planned(s)
    assert [row.request_id for row in third.rows] == ["a", "b", "other"]
    assert [len(s.kv.groups[0].held(slot)) for slot in (0, 1)] == [2, 2]
    error = RuntimeError("the step died")
    assert [event.request_id for event in s.fail(first.step_id, error)] == ["a", "b"]
    assert not s.kv.found(first.chunks[0].request.keys[:2]).num
    retire(s, second)
    retire(s, third)
    s.check()
    assert s.num_running == 1
