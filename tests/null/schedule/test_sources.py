"""What an encoder reads: blocks for all of it at admission, one run a step within its limit, again after preemption."""

from __future__ import annotations

import random
from collections import deque

import pytest

from penstock.errors import PromptError
from penstock.runtime.kv.blocks import BlockPool
from penstock.runtime.kv.manager import KvManager
from penstock.runtime.kv.tables import Tables
from penstock.runtime.schedule.batch import StepPlan
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.request import Request
from penstock.runtime.schedule.scheduler import Scheduler

BLOCK, TOKENS, LENGTH = 4, 24, 40


def scheduler(own: int, cross: int, slots: int = 4, in_flight: int = 1) -> Scheduler:
    tables = [Tables(BlockPool(own, BLOCK)), Tables(BlockPool(cross, BLOCK, 1), fixed=True)]
    return Scheduler(Limits(slots, TOKENS, LENGTH, in_flight), KvManager(tables, reuse=False))


def request(name: str, read: int, new: int, **more: object) -> Request:
    return Request(name, (1,), new, LENGTH, source=tuple(range(read)), **more)  # type: ignore[arg-type]


def run(machine: Scheduler, requests: list[Request]) -> list[StepPlan]:
    """To the end; every sample is token 7."""
    plans, flying = [], deque[StepPlan]()
    for each in requests:
        machine.add(each)
    while machine.has_work:
        if machine.can_schedule and (plan := machine.schedule()):
            plans.append(plan)
            flying.append(plan)
        if flying and not (machine.can_schedule and machine.num_in_flight == 0):
            done = flying.popleft()
            machine.retire(done.step_id, [7] * len(done.sampling))
        machine.check()
    assert machine.kv.usage == 0
    return plans


@pytest.mark.parametrize("seed", range(40))
def test_every_input_is_read_whole_within_the_limits(seed: int) -> None:
    draw = random.Random(seed)
    wanted = [request(str(i), draw.randint(1, TOKENS), draw.randint(1, 30)) for i in range(12)]
    machine = scheduler(draw.randint(10, 30), draw.randint(7, 16), draw.randint(1, 4), draw.randint(1, 2))
    plans = run(machine, wanted)
    admissions = [(each, plan) for plan in plans for each in plan.admitted]
    for each, _ in admissions:
        cross = each.block_tables[1]
        assert len(cross) == -(-len(each.request.source) // BLOCK) and 0 not in cross and each.num_reused == 0
    for plan in plans:
        assert sum(len(each.request.source) for each in plan.admitted) <= TOKENS
    assert len(admissions) == len(wanted) + machine.counters.preemptions
    assert [each.output for each in wanted] == [[7] * each.max_tokens for each in wanted]


def test_no_two_that_run_share_blocks_of_what_was_read() -> None:
    machine = scheduler(40, 13)
    for name in "abc":
        machine.add(request(name, 12, 20))
    plans = [machine.schedule(), None]
    machine.retire(0, [7] * 2)  # type: ignore[arg-type]
    plans[1] = machine.schedule()
    tables = [each.block_tables[1] for plan in plans if plan for each in plan.admitted]
    assert [len(plan.admitted) for plan in plans if plan] == [2, 1]  # 24 tokens a run
    assert len({block for table in tables for block in table}) == 9


def test_what_never_fits_is_refused_before_it_waits() -> None:
    machine = scheduler(40, 6)
    for read, match in (
        (25, r"has 25 tokens, the limit is 24: .* max_num_tokens=24, and max_seq_len=40 .*; shorten it"),
        (21, r"has 21 tokens, and the whole pool of what an encoder makes holds 20; shorten it"),
    ):
        with pytest.raises(PromptError, match=match):
            machine.add(request("a", read, 4))
    assert not machine.has_work


def test_a_text_that_a_limit_cuts_ends_with_the_forced_token() -> None:
    cut, ended = request("a", 3, 5, forced_end=9), request("b", 3, 5, forced_end=9, eos_ids=frozenset({7, 9}))
    run(scheduler(40, 12), [cut, ended])
    assert (cut.output, cut.finish_reason) == ([7, 7, 7, 7, 9], "length")
    assert (ended.output, ended.finish_reason) == ([7], "stop")
