"""Several groups of layers: what is found must be there for all, and each has its own blocks and its own rule."""

from __future__ import annotations

import pytest

from penstock.errors import PromptError, UnsupportedError
from penstock.runtime.kv.blocks import BlockPool
from penstock.runtime.kv.manager import Fit, KvManager
from penstock.runtime.kv.tables import UNSEEN, Copy, Grown, Tables
from penstock.runtime.schedule.beams import BeamRules
from penstock.runtime.schedule.groups import BeamGroup
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.request import Request
from penstock.runtime.schedule.scheduler import Scheduler
from tests.null.kv.books import mixed

A, B, C, D = (bytes([i]) * 32 for i in range(4))


def test_a_prefix_is_found_where_every_group_has_what_is_seen() -> None:
    kv = mixed((9, 9), 4, (0, 5))
    kv.admit(0, [A, B, C], 12)
    refs = [*kv.publish(0, 0, [A, B, C])]
    assert [ref.group for ref in refs] == [0] * 3 + [1] * 3
    (first, second, third), (one, two, three) = refs[:3], refs[3:]
    found = kv.found([A, B, C, D])
    assert found == (3, ([first, second, third], [UNSEEN, UNSEEN, three]))
    kv.withdraw([three])
    assert kv.found([A, B, C, D]) == (2, ([first, second], [UNSEEN, two])), "behind the second it sees the second"
    kv.withdraw([two])
    assert kv.found([A, B, C, D]) == (1, ([first], [one]))
    kv.withdraw([first])
    assert kv.found([A, B, C, D]) == (0, ([], [])), "a layer that sees all misses the first"
    kv.check()


def test_what_one_window_still_sees_may_be_missing_for_another() -> None:
    """The text is found as far as the first gap that both see, however far either would reach alone."""
    kv = mixed((9, 9), 4, (5, 9))
    keys = [bytes([i]) * 32 for i in range(6)]
    kv.admit(0, keys, 24)
    refs = kv.publish(0, 0, keys)
    one, two = refs[:6], refs[6:]
    kv.withdraw([one[5], two[3]])
    found = kv.found(keys)
    assert found == (3, ([UNSEEN, UNSEEN, one[2]], [UNSEEN, *two[1:3]])), "behind the fifth the second sees the fourth"
    kv.withdraw([one[0], two[0]])
    assert kv.found(keys) == found, "what nobody sees"
    kv.withdraw([one[2]])
    assert kv.found(keys).num == 0, "behind the second the second sees the first"
    kv.check()


def test_each_group_must_have_room_and_a_chunk_is_all_that_a_window_asks_for() -> None:
    kv = mixed((9, 4), 4, (0, 5))
    assert kv.fit((), 32) is Fit.NO and kv.fit((), 32, first=8) is Fit.YES
    assert kv.fit((), 32, (0, 1), first=8) is Fit.YES and kv.fit((), 32, (1, 0), first=8) is Fit.NO
    kv.admit(0, (), 32, (0, 1), first=12)
    assert [len(table) for table in kv.tables(0)] == [8, 2], "one is left, as asked"
    assert kv.num_free == 0 and not kv.lacks(0, 8) and kv.lacks(0, 9)
    assert kv.reach(0, 32) == 12 and kv.reach(0, 32, spare=1) == 8
    assert kv.grow(0, 12) == [Grown(0, 2, kv.tables(0)[1][2], 1)] and kv.reach(0, 32) == 12
    kv.slide(0, 12)
    assert kv.reach(0, 32) == 20 and len(kv.groups[1].held(0)) == 1
    assert [grown.at for grown in kv.grow(0, 20)] == [3, 4] and kv.groups[1].pool.num_free == 0
    assert kv.usage == 1.0 and kv.waste({0: 20}) == pytest.approx(12 / 44)
    kv.check()
    kv.free(0)
    assert kv.usage == 0 and kv.num_usable == 8
    kv.check()


def test_a_copy_for_each_group_of_beams() -> None:
    kv = mixed((9, 9), 4, (0, 5))
    for slot, tokens in ((0, 10), (1, 0)):
        kv.admit(slot, (), tokens)
    copies = kv.fork(0, 1, 10)
    tables = zip(kv.tables(0), kv.tables(1), strict=True)
    assert copies == tuple(Copy(a[2], b[2], group) for group, (a, b) in enumerate(tables))
    assert not kv.short_of(4, ()) and kv.short_of(5, ()) and not kv.short_of(5, [1]), "it gives one of each back"
    kv.check()


def test_a_table_that_is_fixed_at_admission() -> None:
    """What cross-attention reads: as long as the encoder's text, whatever the decoder's becomes."""
    kv = KvManager([Tables(BlockPool(9, 4)), Tables(BlockPool(5, 4, 1), fixed=True)])
    assert kv.fit([A], 6, fixed=17) is Fit.NO and kv.fit([A], 6, (2, 2), fixed=16) is Fit.YES
    kv.admit(0, [A], 6, fixed=10)
    kv.publish(0, 0, [A])
    assert [len(table) for table in kv.tables(0)] == [2, 3] and kv.num_free == 6, "which need not grow"
    assert [grown.group for grown in kv.grow(0, 9)] == [0] and not kv.lacks(0, 12)
    assert kv.found([A]).num == 1 and kv.found([A]).refs[1] == [] and kv.fits_pools(32)
    kv.admit(1, (), 0)
    assert kv.fork(0, 1, 9) == (Copy(kv.tables(0)[0][2], kv.tables(1)[0][2]),) and kv.tables(1)[1] == kv.tables(0)[1]
    assert kv.groups[1].pool.num_used == 3 and kv.waste({0: 9, 1: 9}) == pytest.approx(6 / 16)
    kv.check()
    kv.free(0)
    assert kv.groups[1].pool.num_used == 3
    kv.free(1)
    assert kv.usage == 0
    kv.check()


def test_state_by_slot_needs_no_blocks_and_cannot_be_forked() -> None:
    s = Scheduler(Limits(2, 8, 64, 2), KvManager([], reuse=False, by_slot=True))
    for name in "abc":
        s.add(Request(name, (1,) * 20, 4, 64))
    flight = []
    while s.has_work:
        if plan := s.schedule():
            assert not plan.grown and not plan.published and all(each.block_tables == () for each in plan.admitted)
            flight.append(plan)
        s.check()
        if plan is None or not s.can_schedule:
            done = flight.pop(0)
            s.retire(done.step_id, [7] * len(done.sampling))
    assert s.counters.generated_tokens == 12 and s.counters.reused_tokens == s.waste() == s.kv.usage == 0
    with pytest.raises(UnsupportedError, match="state that cannot be forked"):
        s.add(BeamGroup(Request("g", (1,), 4, 64), BeamRules(2)).leader)


def _run_all(s: Scheduler, most: int) -> None:
    """Every step to its end; the second group never holds more than so many blocks."""
    flight = []
    while s.has_work:
        if plan := s.schedule():
            flight.append(plan)
        s.check()
        assert s.kv.groups[1].pool.num_used <= most
        if plan is None or not s.can_schedule:
            done = flight.pop(0)
            beams = [request for request in done.sampling if request.group is not None]
            s.retire(
                done.step_id, [7] * len(done.sampling), [[(7, -0.1), (8, -0.2), (9, -0.3), (6, -0.4)]] * len(beams)
            )


def test_long_prompts_pass_through_a_small_pool_in_turn() -> None:
    s = Scheduler(Limits(3, 12, 64, 2), mixed((49, 5), 4, (0, 9)))
    for name in ("a", "b", "c"):
        s.add(Request(name, tuple(range(ord(name), ord(name) + 40)), 8, 64))
    _run_all(s, most=4)
    assert s.counters.generated_tokens == 24


def test_beams_fork_though_their_prompt_filled_the_pool() -> None:
    """What the prompt's last chunk held below the window makes room for the copies."""
    s = Scheduler(Limits(2, 16, 64, 2), mixed((49, 5), 4, (0, 5)))
    s.add(BeamGroup(Request("g", tuple(range(14)), 12, 64), BeamRules(2)).leader)
    _run_all(s, most=4)
    with pytest.raises(PromptError, match=r"pool of layers with a window of 6 holds 16 \(4 blocks of 4\)"):
        wider = Scheduler(Limits(2, 16, 64, 2), mixed((49, 5), 4, (0, 6)))
        wider.add(BeamGroup(Request("g", tuple(range(14)), 12, 64), BeamRules(2)).leader)
