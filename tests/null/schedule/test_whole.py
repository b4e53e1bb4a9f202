"""Prompts whose first tokens see each other: those are of one step, again after preemption, and shared with nobody."""

from __future__ import annotations

import random
from collections import deque

import pytest

from penstock.errors import PromptError
from penstock.runtime.schedule.batch import Chunk, StepPlan
from penstock.runtime.schedule.beams import BeamRules
from penstock.runtime.schedule.groups import BeamGroup
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.request import Request
from penstock.runtime.schedule.scheduler import Scheduler
from tests.null.kv.books import books

TOKENS, LENGTH = 24, 48


def request(name: str, whole: int, more: int, new: int, **rest: object) -> Request:
    return Request(name, (1,) * (whole + more), new, LENGTH, whole=whole, **rest)  # type: ignore[arg-type]


def run(machine: Scheduler, requests: list[Request], draw: random.Random) -> list[Chunk]:
    """To the end, some cancelled on the way; every sample is token 7. All chunks, in order."""
    chunks: list[Chunk] = []
    flying, waiting = deque[StepPlan](), deque(requests)
    while waiting or machine.has_work:
        if waiting and draw.random() < 0.5:
            machine.add(waiting.popleft())
        if machine.can_schedule and (plan := machine.schedule()):
            assert plan.num_tokens <= TOKENS
            chunks += plan.chunks
            flying.append(plan)
        if flying and (not machine.can_schedule or draw.random() < 0.5):
            done = flying.popleft()
            machine.retire(done.step_id, [7] * len(done.sampling))
        if draw.random() < 0.02:
            machine.abort(draw.choice(requests).id)
        machine.check()
    assert machine.kv.usage == 0
    return chunks


@pytest.mark.parametrize("seed", range(60))
def test_what_sees_itself_is_of_one_step(seed: int) -> None:
    """Beside others whose prompts are cut where the step is full, in pools so small that some make room."""
    draw = random.Random(seed)
    wanted = [
        request(str(i), draw.choice((0, draw.randint(1, TOKENS))), draw.randint(1, 12), draw.randint(1, 12))
        for i in range(14)
    ]
    limits = Limits(draw.randint(1, 4), TOKENS, LENGTH, draw.randint(1, 2))
    machine = Scheduler(limits, books(draw.randint(13, 30), 4), draw.choice((None, lambda decoding: 3)))
    for chunk in run(machine, wanted, draw):
        if chunk.request.whole:
            assert chunk.start == 0 or chunk.start >= chunk.request.whole, "a chunk begins within what sees itself"
            assert chunk.start + chunk.num_tokens >= chunk.request.whole
    assert all(r.finish_reason == "abort" or r.output == [7] * r.max_tokens for r in wanted)
    assert not any(r.num_reused for r in wanted if r.whole)


def test_some_are_preempted_and_some_cut() -> None:
    """What the test above is about does happen: prompts computed anew in more than one step."""
    cut = preempted = 0
    for seed in range(20):
        draw = random.Random(seed)
        wanted = [request(str(i), draw.randint(8, 20), 4, 20) for i in range(10)]
        machine = Scheduler(Limits(4, TOKENS, LENGTH, 2), books(17, 4))
        cut += sum(chunk.start > 0 for chunk in run(machine, wanted, draw))
        preempted += machine.counters.preemptions
    assert cut > 0 and preempted > 0


def test_it_waits_for_room_and_lets_nobody_pass() -> None:
    machine = Scheduler(Limits(4, TOKENS, LENGTH, 1), books(60, 4))
    first, second, third = request("a", 20, 1, 3), request("b", 20, 1, 3), request("c", 2, 1, 3)
    for each in (first, second, third):
        machine.add(each)
    steps = []
    while machine.has_work:
        plan = machine.schedule()
        assert plan is not None
        steps.append([(chunk.request.id, chunk.start, chunk.num_tokens) for chunk in plan.chunks])
        machine.retire(plan.step_id, [7] * len(plan.sampling))
    # Beside who decodes there is room for 23, then 22: all of what sees itself, and of the rest as much as fits.
    assert steps[:3] == [[("a", 0, 21)], [("b", 0, 21), ("c", 0, 2)], [("c", 2, 1)]]


def test_who_lacks_room_for_all_waits_and_lets_nobody_pass() -> None:
    machine = Scheduler(Limits(4, TOKENS, LENGTH, 1), books(60, 4))
    for each in (request("a", 4, 1, 3), request("b", TOKENS, 1, 3), request("c", 1, 1, 3)):
        machine.add(each)
    joined: list[list[str]] = []
    while machine.has_work:
        plan = machine.schedule()
        assert plan is not None
        joined.append([each.request.id for each in plan.admitted])
        machine.retire(plan.step_id, [7] * len(plan.sampling))
    assert [each for each in joined if each] == [["a"], ["b"], ["c"]] and joined[1:3] == [[], []]


def test_equal_prompts_are_computed_twice() -> None:
    machine = Scheduler(Limits(2, TOKENS, LENGTH, 1), books(60, 4))
    for name in ("a", "b"):
        run(machine, [request(name, 16, 1, 2)], random.Random(1))
    assert machine.counters.reused_tokens == 0
    group = BeamGroup(request("beams", 16, 1, 3), BeamRules(2))
    assert all(beam.whole == 16 for beam in group.beams)


def test_more_than_a_step_takes_is_refused_before_it_waits() -> None:
    machine = Scheduler(Limits(2, TOKENS, LENGTH, 1), books(60, 4))
    with pytest.raises(PromptError, match=r"begins with 25 tokens that see each other, .*max_num_tokens=24.*shorten"):
        machine.add(request("a", 25, 1, 2))
    assert not machine.has_work
