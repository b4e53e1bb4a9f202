"""Evicted blocks in the host's memory: saved before they are overwritten, found by key, believed only if written."""

from __future__ import annotations

import pytest

from penstock.runtime.kv.blocks import BlockRef
from penstock.runtime.kv.host import HostCache, Restored, Saved
from penstock.runtime.kv.manager import Fit
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.request import Request
from penstock.runtime.schedule.scheduler import Scheduler
from tests.null.kv.books import books, mixed

A, B, C, D = (bytes([i]) * 32 for i in range(4))


def test_the_least_recently_used_makes_room() -> None:
    host = HostCache(2)
    host.save(5, A)
    host.save(6, B)
    assert host.take().saved == (Saved(5, 0), Saved(6, 1)) and host.usage == 1.0
    host.save(7, A)  # is there already: nothing is copied, and B is now the older
    host.save(8, C)
    assert host.take().saved == (Saved(8, 1),) and A in host and B not in host and C in host
    host.check()
    none = HostCache(0)
    none.save(1, A)
    assert A not in none and none.usage == 0 and none.take() == ((), (), ())
    none.check()


def test_within_a_plan_a_block_is_written_once_and_not_under_a_copy_back() -> None:
    host = HostCache(2)
    host.save(5, A)
    host.take()
    host.hold([A])
    host.save(6, B)
    host.save(7, C)  # B makes room, A may not
    host.restore(A, BlockRef(9, 3))
    assert host.take() == ((Saved(7, 1),), (Restored(0, 9),), (BlockRef(9, 3),)) and B not in host
    host.hold([A, C])
    host.save(8, D)
    assert D not in host and host.take().saved == ()
    host.save(8, D)  # of A and C the tail is the older
    assert A in host and C not in host
    host.check()


def test_a_failed_copy_is_not_believed() -> None:
    host = HostCache(2)
    host.save(5, A)
    host.save(6, B)
    (_, first, _), _ = host.take().saved
    host.withdraw([first])
    host.withdraw([first])
    assert A not in host and B in host
    host.save(5, A)
    host.withdraw([first])  # before the plan is made
    assert A not in host and host.take().saved == ()
    host.check()


def test_an_evicted_prefix_comes_back_in_part() -> None:
    kv = books(5, 4, hosts=4)
    kv.admit(0, [A, B, C], 13)
    kv.publish(0, 0, [A, B, C])
    kv.free(0)
    kv.admit(1, [], 8)  # the free block, and C's, the tail
    assert kv.found([A, B, C]).refs[0] == [kv.only.pool.find(A), kv.only.pool.find(B), None] and C in kv.only.host
    assert kv.fit([A, B, C], 12) is Fit.NO and kv.fit([A, B, C, D], 8) is Fit.YES
    kv.free(1)
    assert kv.admit(2, [A, B, C], 13) == 3
    saved, restored, refs = kv.only.host.take()
    assert None not in kv.found([A, B, C]).refs[0] and len(saved) == len(restored) == 1
    assert restored == (Restored(saved[0].host_block, kv.only.table(2)[2]),) and refs == (kv.only.pool.find(C),)
    assert kv.only.host.num_restored == 1 and kv.admit(3, [A, B, C], 12) == 3, "what was restored is shared"
    kv.check()


def test_what_is_found_does_not_make_room_for_the_rest() -> None:
    """The one block of the host holds what is wanted; the request's own blocks evict others meanwhile."""
    kv = books(4, 4, hosts=1)
    kv.only.host.save(1, A)
    kv.only.host.take()
    kv.admit(0, [B, C, D], 12)
    kv.publish(0, 0, [B, C, D])
    kv.free(0)
    assert kv.fit([A], 12) is Fit.YES and kv.admit(1, [A], 12) == 1
    assert kv.only.host.take() == ((), (Restored(0, kv.only.table(1)[0]),), kv.only.refs(1)[:1])
    kv.check()


def _scheduler() -> Scheduler:
    return Scheduler(Limits(2, 32, 32, 2), books(4, 4, hosts=8))


def _run(scheduler: Scheduler, name: str, token: int, length: int = 9) -> Request:
    """A request, by default of two full blocks and some, to its end."""
    request = Request(name, (token,) * length, 1, 32)
    scheduler.add(request)
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.retire(plan.step_id, [7] * len(plan.sampling))
    return request


def test_a_plan_says_what_goes_out_and_what_comes_back() -> None:
    scheduler = _scheduler()
    assert [_run(scheduler, str(i), i).num_reused for i in (1, 2, 1)] == [0, 0, 8]
    assert scheduler.counters.reused_tokens == 8 and scheduler.kv.groups[0].host.num_restored == 2
    request = Request("last", (2,) * 9, 1, 32)
    scheduler.add(request)
    plan = scheduler.schedule()
    assert plan is not None and len(plan.restored) == 2 and plan.chunks[0].num_tokens == 1
    assert {block for _, block, _ in plan.restored} <= {ref.block for ref in plan.published}
    assert plan.saved == (), "the host has the first prefix still"


def test_a_step_that_failed_has_saved_and_restored_nothing() -> None:
    scheduler = _scheduler()
    _run(scheduler, "first", 1)
    scheduler.add(Request("second", (2,) * 9, 1, 32))
    plan = scheduler.schedule()
    assert plan is not None and plan.saved
    scheduler.fail(plan.step_id, RuntimeError("died"))
    assert scheduler.kv.groups[0].host.usage == 0
    scheduler = _scheduler()
    _run(scheduler, "first", 1)
    _run(scheduler, "second", 2)
    scheduler.add(Request("third", (1,) * 9, 1, 32))
    plan = scheduler.schedule()
    assert plan is not None and plan.restored
    targets = {block for _, block, _ in plan.restored}
    keys = plan.chunks[0].request.keys
    assert {ref.block for ref in scheduler.kv.found(keys).refs[0] if ref} == targets
    scheduler.fail(plan.step_id, RuntimeError("died"))
    assert scheduler.kv.found(keys).refs[0] == [None, None] and scheduler.kv.groups[0].pool.num_idle == 0, (
        "the host still has them"
    )
    scheduler.check()


def test_what_a_failed_step_restored_is_lost_in_every_group() -> None:
    scheduler = Scheduler(Limits(2, 32, 32, 2), mixed((4, 4), 4, (0, 0), hosts=8))
    _run(scheduler, "first", 1)
    _run(scheduler, "second", 2)
    scheduler.add(Request("third", (1,) * 9, 1, 32))
    plan = scheduler.schedule()
    assert plan is not None and [each.group for each in plan.restored] == [0, 0, 1, 1]
    assert {(group, block) for _, block, group in plan.restored} <= {(r.group, r.block) for r in plan.published}
    scheduler.fail(plan.step_id, RuntimeError("died"))
    assert scheduler.kv.found(plan.chunks[0].request.keys).refs == ([None, None], [None, None])
    scheduler.check()


@pytest.mark.parametrize("group", [0, 1])
def test_whoever_restores_what_a_failed_step_should_have_saved_ends_with_it(group: int) -> None:
    """Of several groups the one whose pool is too small."""
    for failing in (True, False):
        kv = mixed([30, 10] if group else [10, 30], 4, (0, 0), hosts=8)
        scheduler = Scheduler(Limits(2, 32, 32, 2), kv)
        first = _run(scheduler, "first", 1)
        _run(scheduler, "other", 2, 13)
        scheduler.add(Request("long", (3,) * 17, 9, 32))
        saving = scheduler.schedule()
        assert saving is not None and [each.group for each in saving.saved] == [group]
        scheduler.add(Request("reader", (1,) * 9, 9, 32))
        reading = scheduler.schedule()
        assert reading is not None and len(reading.restored) == 1 and reading.restored[0][0] == saving.saved[0][1]
        if not failing:
            scheduler.retire(saving.step_id, [7])
        events = scheduler.fail((saving if failing else reading).step_id, RuntimeError("died"))
        assert [event.request_id for event in events] == ["long", "reader"]
        assert (first.keys[1] in kv.groups[group].host) == (not failing)
        scheduler.check()


def test_what_a_failed_step_should_have_written_is_not_kept_though_a_window_gave_it_away() -> None:
    """The next step, planned before the first one failed, copies a block to the host that nothing was written to."""
    scheduler = Scheduler(Limits(1, 8, 64, 2), books(4, 4, window=5, hosts=8))
    request = Request("long", tuple(range(20)), 2, 64)
    scheduler.add(request)
    writing, saving = scheduler.schedule(), scheduler.schedule()
    assert writing is not None and saving is not None and saving.saved[0].block == writing.published[0].block
    scheduler.fail(writing.step_id, RuntimeError("died"))
    assert request.keys[0] not in scheduler.kv.groups[0].host
    scheduler.check()
