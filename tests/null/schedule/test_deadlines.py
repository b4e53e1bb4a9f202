"""Deadlines by example, and against a plain list of them."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.runtime.schedule.deadlines import SLACK, Deadlines


def test_who_waits_too_long_is_due_and_told_once() -> None:
    deadlines = Deadlines()
    deadlines.add("a", 5.0, 20.0)
    deadlines.add("b", 3.0, None)
    deadlines.add("c", None, 4.0)
    assert deadlines.next() == 3.0 and deadlines.due(2.9) == []
    assert deadlines.due(4.5) == ["b", "c"] and deadlines.due(4.5) == []
    assert deadlines.next() == 5.0 and len(deadlines) == 1


def test_once_admitted_only_the_end_counts() -> None:
    deadlines = Deadlines()
    deadlines.add("a", 5.0, 20.0)
    deadlines.admitted("a")
    deadlines.admitted("a")
    assert deadlines.next() == 20.0 and deadlines.due(19.9) == []
    assert deadlines.due(20.0) == ["a"], "the moment itself is too late"


def test_an_end_before_the_wait_is_over_counts_while_waiting() -> None:
    deadlines = Deadlines()
    deadlines.add("a", 9.0, 2.0)
    assert deadlines.due(2.0) == ["a"]


def test_who_has_no_deadline_is_not_kept() -> None:
    deadlines = Deadlines()
    deadlines.add("a", None, None)
    deadlines.add("b", 1.0, inf)
    deadlines.admitted("a")
    deadlines.admitted("b")
    deadlines.remove("a")
    deadlines.remove("nobody")
    assert deadlines.next() is None and deadlines.due(inf) == [] and len(deadlines) == 0


def test_an_id_may_come_again() -> None:
    deadlines = Deadlines()
    deadlines.add("a", None, 5.0)
    deadlines.remove("a")
    deadlines.add("a", None, 7.0)
    with pytest.raises(AssertionError, match="already"):
        deadlines.add("a", 1.0, None)
    assert deadlines.due(6.0) == [] and deadlines.due(7.0) == ["a"]


def test_those_that_left_take_no_room() -> None:
    deadlines = Deadlines()
    for i in range(10_000):
        deadlines.add(str(i), 1e9, 2e9 + i)
        deadlines.admitted(str(i))
        deadlines.remove(str(i))
    assert len(deadlines) == 0 and len(deadlines._heap) <= SLACK + 3


MOMENT = st.none() | st.integers(0, 20)
CALLS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 7), MOMENT, MOMENT),
    st.tuples(st.sampled_from(("admitted", "remove")), st.integers(0, 7)),
    st.tuples(st.just("due"), st.integers(0, 3)),
)


@given(st.lists(CALLS, max_size=60))
def test_as_a_plain_list(calls: list[tuple[str, int, int | None, int | None]]) -> None:
    """The model looks at every request each time."""
    deadlines, plain, now = Deadlines(), dict[str, tuple[float, float]](), 0
    for call, number, *moments in calls:
        name = str(number)
        if call == "due":
            now += number
            late = sorted((min(both), name) for name, both in plain.items() if min(both) <= now)
            assert deadlines.due(now) == [name for _, name in late]
            for _, gone in late:
                del plain[gone]
        elif call == "add":
            if name not in plain:
                wait, end = (inf if m is None else float(m) for m in moments)
                deadlines.add(name, *moments)
                plain[name] = (wait, end)
        elif call == "admitted":
            deadlines.admitted(name)
            plain.update({name: (inf, plain[name][1])} if name in plain else {})
        else:
            deadlines.remove(name)
            plain.pop(name, None)
        plain = {name: both for name, both in plain.items() if min(both) < inf}
        assert len(deadlines) == len(plain)
        assert deadlines.next() == min((min(both) for both in plain.values()), default=None)
