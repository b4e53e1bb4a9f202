"""Beam groups in the scheduler by example: one prompt, forks, copies of the last block, whole preemption, one end."""

from __future__ import annotations

from itertools import pairwise

import pytest

from penstock.errors import OptionError, PromptError
from penstock.runtime.kv.tables import Copy
from penstock.runtime.schedule.batch import Event, StepPlan
from penstock.runtime.schedule.beams import BeamRules
from penstock.runtime.schedule.groups import BeamGroup
from penstock.runtime.schedule.scheduler import Scheduler
from tests.null.schedule.test_scheduler import planned, request, retire, scheduler

Candidates = list[tuple[int, float]]


def group(name: str = "g", prompt: int = 6, max_tokens: int = 8, width: int = 3, **more: object) -> BeamGroup:
    return BeamGroup(request(name, prompt, max_tokens, **more), BeamRules(width))


def searched(s: Scheduler, plan: StepPlan, *candidates: Candidates) -> tuple[Event, ...]:
    return s.retire(plan.step_id, [7] * len(plan.sampling), candidates)


def best(*tokens: int, first: float = -1.0) -> Candidates:
    """Each less likely than the one before it."""
    return [(token, first - i) for i, token in enumerate(tokens)]


def test_one_prompt_then_forks_with_copies_of_the_last_block() -> None:
    s, g = scheduler(in_flight=1), group()
    s.add(g.leader)
    plan = planned(s)
    assert [row[1:4] for row in plan.rows] == [("g", 0, 6)] and len(plan.admitted) == 1 and plan.retabled == ()
    assert (s.num_running, s.kv.groups[0].pool.num_used, s.kv.slots) == (1, 2, {0, 1, 2})
    assert searched(s, plan, best(11, 12, 13, 14, 15, 16)) == ()
    plan = planned(s)
    assert [chunk[1:] for chunk in plan.chunks] == [(slot, 6, 1, 1, True) for slot in range(3)]
    assert [beam.output for beam in g.beams] == [[11], [12], [13]]
    shared, last = s.kv.groups[0].table(0)
    assert [fork[:3] for fork in plan.retabled] == [(slot, s.kv.tables(slot), 6) for slot in (1, 2)]
    assert [fork.request for fork in plan.retabled] == [*g.beams[1:]] and all(fork.fresh for fork in plan.retabled)
    assert plan.copies == tuple(Copy(last, s.kv.groups[0].table(slot)[1]) for slot in (1, 2))
    assert (
        s.kv.groups[0].pool.holders(s.kv.groups[0].refs(0)[0]) == 3
        and shared == s.kv.groups[0].table(1)[0] == s.kv.groups[0].table(2)[0]
    )
    # The third beam wins twice, the second once, the first dies: its slot goes to the third's second child.
    searched(s, plan, best(1, 2, 3, 4, 5, 6, first=-90), best(21, 5, 5, 5, 5, 5, first=-3.5), best(31, 32, 5, 5, 5, 5))
    plan = planned(s)
    assert [beam.output for beam in g.beams] == [[13, 32], [12, 21], [13, 31]]
    (fork,) = plan.retabled
    assert (fork.slot, fork.length, fork.fresh) == (0, 7, False)
    assert (
        fork.copies == (Copy(s.kv.groups[0].table(2)[1], s.kv.groups[0].table(0)[1]),)
        and s.kv.groups[0].pool.num_used == 4
    )
    s.check()


def test_at_a_border_of_blocks_nothing_is_copied_and_each_gets_a_block() -> None:
    s, g = scheduler(in_flight=1), group(prompt=8)
    s.add(g.leader)
    searched(s, planned(s), best(11, 12, 13, 14, 15, 16))
    plan = planned(s)
    assert plan.copies == () and [fork.slot for fork in plan.retabled] == [1, 2]
    assert [grown[:2] for grown in plan.grown] == [(0, 2), (1, 2), (2, 2)] and s.kv.groups[0].pool.num_used == 5


def test_a_round_is_over_when_all_results_are_known() -> None:
    s, g = scheduler(slots=2, tokens=2), group(prompt=1, width=2)
    s.add(g.leader)
    searched(s, planned(s), best(11, 12, 13, 14))
    plan = planned(s)
    assert s.schedule() is None, "both beams are under way"
    searched(s, plan, best(21, 22, 23, 24), best(31, 32, 33, 34))
    assert (
        len(planned(s).copies) == 1
        and g.search.length == 2
        and [beam.output for beam in g.beams] == [[11, 21], [11, 22]]
    )


@pytest.mark.parametrize("how", ["end", "abort", "fail"])
def test_it_ends_once_and_gives_all_back(how: str) -> None:
    s, error = scheduler(in_flight=1), RuntimeError("out of luck")
    g = group(max_tokens=2)
    s.add(g.leader)
    searched(s, planned(s), best(11, 12, 13, 99, 15, 16))
    plan = planned(s)
    expected = {
        "end": Event("g", None, "length"), "abort": Event("g", None, "abort"), "fail": Event("g", None, "error", error),
    }[how]  # fmt: skip
    if how == "fail":
        assert s.fail(plan.step_id, error) == (expected,)
    else:
        aborted = s.abort("g") if how == "abort" else None
        events = searched(s, plan, *[best(21, 22, 23, 24, 25, 26)] * 3)
        assert (aborted,) == (expected,) if aborted else events == (expected,)
    assert s.abort("g") is None and not s.has_work and s.kv.groups[0].pool.num_used == 0
    assert len(g.search.finished) == (3 if how == "end" else 0)
    s.check()


def test_a_group_waits_for_its_slots_and_nobody_passes() -> None:
    s = scheduler(in_flight=1, tokens=16)
    s.add(request("a", 2, max_tokens=3))
    s.add(request("b", 2, max_tokens=1))
    s.add(group().leader)
    s.add(request("c", 2))
    plan = planned(s)
    assert [row.request_id for row in plan.rows] == ["a", "b"] and s.num_waiting == 2
    retire(s, plan)
    assert [row.request_id for row in planned(s).rows] == ["a", "g"]


@pytest.mark.parametrize("prompt", range(5, 9))
@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_group_is_preempted_whole_and_searches_anew(in_flight: int, prompt: int) -> None:
    found = []
    for blocks in (9, 40):
        s, g = scheduler(slots=3, tokens=16, blocks=blocks, in_flight=in_flight), group("g", 5, 9, width=2, salt=b"g")
        s.add(request("a", prompt, max_tokens=32 - prompt))
        s.add(g.leader)
        rounds, flight = list[int](), list[StepPlan]()
        while s.has_work:
            if s.can_schedule and (plan := s.schedule()):
                flight.append(plan)
            rounds.append(g.search.length)
            if len(flight) == in_flight or plan is None:
                oldest = flight.pop(0)
                beams = [beam for beam in oldest.sampling if beam.group]
                searched(s, oldest, *[best(10 * len(beam.output) + 1, 2, 3, 4, first=-0.5) for beam in beams])
            s.check()
        back = [(before, after) for before, after in pairwise(rounds) if after < before]
        assert s.counters.preemptions == g.leader.num_preemptions == len(back) == (blocks == 9)
        assert all(before > 1 and after == 0 for before, after in back) and s.kv.groups[0].pool.num_used == 0
        found.append(g.search.finished)
    assert found[0] == found[1] and len(found[0]) == 2


def test_groups_that_cannot_run_are_refused() -> None:
    with pytest.raises(OptionError, match="beam_width=17 is out of range; give 1 to 16"):
        group(width=17)
    with pytest.raises(OptionError, match="'g' has beam_width=5, the limit is max_batch_size=4"):
        scheduler().add(group(width=5).leader)
    s = scheduler(blocks=8)  # full blocks of the prompt are held once: 1, and 3 for each beam
    s.add(group(width=2, max_tokens=10).leader)
    with pytest.raises(PromptError, match="10 to generate, for each of 3 beams"):
        s.add(group("h", width=3, max_tokens=10).leader)


def fork_without_rows() -> tuple[Scheduler, list[StepPlan]]:
    """Two beams need a block each, which come only with the end of a step in flight: of the last plan, they have the
    table of one, and no row."""
    s, flight = scheduler(slots=5, tokens=32, blocks=9, in_flight=2), list[StepPlan]()
    s.add(group("g", 1, 12, width=2, salt=b"g").leader)
    for name, prompt in (("a", 1), ("b", 2), ("c", 1)):
        s.add(request(name, prompt, max_tokens=12, salt=name.encode()))
    for i in range(40):
        if s.can_schedule and (plan := s.schedule()):
            flight.append(plan)
            if plan.retabled and not any(chunk.request.group for chunk in plan.chunks):
                return s, flight
        if flight and (i % 2 == 0 or not s.can_schedule):
            oldest = flight.pop(0)
            beams = [beam for beam in oldest.sampling if beam.group]
            searched(s, oldest, *[best(1, 2, 3, 4, first=-50.0 if beam.slot else -1.0) for beam in beams])
    raise AssertionError("no such plan")


def test_a_fork_may_come_before_the_rows_that_need_it() -> None:
    s, flight = fork_without_rows()
    (fork,) = flight[-1].retabled
    assert fork.slot in flight[-1].slots and fork.slot not in {row.slot for row in flight[-1].rows}
    while not any(chunk.slot == fork.slot for chunk in flight[-1].chunks):
        retire(s, flight.pop(0))
        flight.append(planned(s))
    assert flight[-1].retabled == () and flight[-1].grown[-1].slot == fork.slot


def test_a_group_ends_with_the_step_that_was_to_fork_it() -> None:
    s, flight = fork_without_rows()
    events = s.fail(flight.pop().step_id, RuntimeError("out of luck"))
    assert "g" in [event.request_id for event in events]
    while flight:
        retire(s, flight.pop(0))
    s.check()
