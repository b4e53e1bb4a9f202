"""The KV pool: every block held, idle or free; stale refs found out; contents found again by their keys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ResourceError
from penstock.runtime.kv.blocks import DUMMY_BLOCK, BlockPool
from penstock.runtime.kv.keys import extend_keys
from penstock.runtime.kv.manager import Fit
from penstock.runtime.kv.tables import UNSEEN, Copy, Grown
from tests.null.kv.books import books

A, B, C, D = (bytes([i]) * 32 for i in range(4))


def test_dummy_block_is_never_handed_out() -> None:
    pool = BlockPool(5, 16)
    refs = pool.allocate(4)
    assert sorted(ref.block for ref in refs) == [1, 2, 3, 4]
    assert DUMMY_BLOCK not in {ref.block for ref in refs}
    assert (pool.num_usable, pool.num_used, pool.num_free) == (4, 4, 0)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 16), (0, 16), (4, 0)])
def test_pool_that_holds_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ResourceError, match=f"{num_blocks} blocks of {block_size} tokens"):
        BlockPool(num_blocks, block_size)


def test_over_allocation_is_our_bug() -> None:
    pool = BlockPool(4, 16)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="2 blocks asked of 1"):
        pool.allocate(2)


def test_stale_refs_are_found_out() -> None:
    pool = BlockPool(4, 16)
    old = pool.allocate(1)
    pool.release(old)
    with pytest.raises(AssertionError, match="stale"):
        pool.release(old)
    again = pool.allocate(1)
    assert again[0].block == old[0].block
    for use in (pool.holders, pool.hold):
        with pytest.raises(AssertionError, match="stale"):
            use(old[0])
    assert pool.holders(again[0]) == 1


def test_a_shared_block_is_free_after_its_last_holder() -> None:
    pool = BlockPool(3, 16)
    (ref,) = pool.allocate(1)
    pool.hold(ref)
    pool.release((ref,))
    assert pool.holders(ref) == 1 and pool.num_used == 1
    pool.release((ref,))
    assert pool.num_used == 0
    pool.check()


def test_known_contents_outlive_their_holder_until_the_room_is_wanted() -> None:
    pool = BlockPool(4, 16)
    first, second, third = pool.allocate(3)
    pool.publish(first, A)
    pool.publish(second, B)
    pool.publish(third, A)  # the same contents again: the first are found
    pool.release((second, third, first))
    assert (pool.num_free, pool.num_idle) == (3, 2) and pool.find(A) == first
    pool.hold(first)
    assert pool.num_used == 1
    taken = pool.allocate(2)
    assert [ref.block for ref in taken] == [third.block, second.block], "idle blocks are handed out last"
    assert pool.find(B) is None and pool.num_evicted == 1 and pool.find(A) == first
    with pytest.raises(AssertionError, match="stale"):
        pool.holders(second)
    pool.withdraw(first)
    assert pool.find(A) is None
    pool.check()


def test_what_is_withdrawn_may_be_idle_or_gone() -> None:
    pool = BlockPool(2, 16)
    (old,) = pool.allocate(1)
    pool.publish(old, A)
    pool.release((old,))
    pool.withdraw(old)
    assert pool.find(A) is None and (pool.num_free, pool.num_idle) == (1, 0)
    pool.check()
    (new,) = pool.allocate(1)
    pool.publish(new, B)
    pool.withdraw(old)
    assert new.block == old.block and pool.find(B) == new
    pool.check()


def test_idle_blocks_go_in_the_order_in_which_they_came() -> None:
    pool = BlockPool(4, 16)
    refs = pool.allocate(3)
    for ref, key in zip(refs, (A, B, C), strict=True):
        pool.publish(ref, key)
    pool.release(refs)
    pool.hold(refs[0])
    pool.release(refs[:1])  # used again: now the last to go
    assert [pool.allocate(1)[0].block for _ in range(3)] == [refs[i].block for i in (1, 2, 0)]


def test_keys_name_a_block_with_all_before_it_and_the_salt() -> None:
    def keys(tokens: list[int], salt: bytes = b"") -> list[bytes]:
        out: list[bytes] = []
        extend_keys(out, np.array(tokens, np.int32), 2, salt)
        return out

    long = keys([1, 2, 3, 4, 5])
    assert len(long) == 2 and long[:1] == keys([1, 2]) and len({len(key) for key in long}) == 1
    assert keys([9, 2, 3, 4])[1] != long[1] and keys([1, 2, 3, 4], b"a") != long
    grown = keys([1, 2, 3])
    extend_keys(grown, np.array([1, 2, 3, 4, 5], np.int32), 2)
    assert grown == long


def test_a_prefix_is_shared_waited_for_and_given_back() -> None:
    kv = books(8, 4)
    assert kv.fit([A, B], 11) is Fit.YES and kv.admit(0, [A, B], 11) == 0
    assert kv.fit([A, C], 9) is Fit.PROMISED, "slot 0 is to compute A"
    kv.publish(0, 0, [A])
    assert kv.fit([A, B], 11) is Fit.PROMISED and kv.fit([A, C], 9) is Fit.YES
    assert kv.admit(1, [A, C], 9) == 1 and kv.only.table(1)[0] == kv.only.table(0)[0]
    assert (kv.only.pool.num_used, kv.only.num_own(0), kv.only.num_own(1)) == (5, 2, 2)
    assert kv.waste({0: 4, 1: 6}) == pytest.approx(14 / 20)
    kv.check()
    kv.break_promises(0)
    assert kv.fit([A, B], 11) is Fit.YES and kv.fit([A, B], 11, spare=(1,)) is Fit.NO
    kv.free(0)
    assert kv.fit([A, B], 11, spare=(2,)) is Fit.YES
    assert kv.grow(1, 13) == [Grown(1, 3, kv.only.table(1)[3])]
    kv.free(1)
    assert kv.found([A, B]).num and kv.usage == 0 and kv.waste({}) == 0
    kv.check()


def test_a_fork_shares_full_blocks_and_gets_one_for_the_rest() -> None:
    kv = books(8, 4)
    kv.admit(0, [A], 7)
    for slot in (1, 2):
        kv.admit(slot, (), 0)
    assert (
        kv.fork(0, 1, 7) == (Copy(kv.only.table(0)[1], kv.only.table(1)[1]),)
        and kv.only.table(1)[0] == kv.only.table(0)[0]
    )
    assert kv.fork(0, 2, 4) == () and kv.only.table(2) == kv.only.table(0)[:1]
    assert (kv.only.pool.num_used, kv.only.num_own(0), kv.only.num_own(1), kv.only.num_own(2)) == (3, 1, 1, 0)
    kv.check()
    with pytest.raises(AssertionError, match="slot 1 already holds blocks"):
        kv.fork(0, 1, 7)
    kv.clear(0)
    assert (
        kv.only.table(0) == ()
        and kv.only.pool.num_used == 2
        and kv.fork(1, 0, 6) == (Copy(kv.only.table(1)[1], kv.only.table(0)[1]),)
    )
    for slot in kv.slots:
        kv.free(slot)
    kv.check()
    assert kv.only.pool.num_used == 0


def test_without_reuse_nothing_is_found_or_waited_for() -> None:
    kv = books(8, 4, reuse=False)
    kv.admit(0, [A, B], 11)
    assert kv.publish(0, 0, [A, B]) == [] and kv.fit([A], 5) is Fit.YES and kv.admit(1, [A], 5) == 0
    kv.check()


def test_a_window_gives_back_what_falls_out_of_it() -> None:
    kv = books(9, 4, window=6)
    kv.admit(0, [A, B], 20)
    kv.publish(0, 0, [A])
    table = kv.only.table(0)
    for position, held in ((8, 5), (9, 4), (12, 4), (13, 3), (20, 2), (3, 2)):
        kv.slide(0, position)
        assert (
            kv.only.refs(0)[5 - held :] == tuple(kv.only.held(0))
            and kv.only.pool.num_used == kv.only.num_own(0) == held
        )
        kv.check()
    assert (kv.only.num_blocks(0), kv.only.table(0), kv.waste({0: 18})) == (5, table, pytest.approx(2 / 8))
    assert kv.publish(0, 0, [A, B, C, D]) == [*kv.only.refs(0)[3:4]], "what is given back is another's"
    assert kv.found([A]).num and [kv.only.pool.find(key) for key in (B, C, D)] == [None, None, kv.only.refs(0)[3]]
    kv.admit(1, (), 0)
    assert kv.fork(0, 1, 18) == (Copy(table[4], kv.only.table(1)[4]),) and kv.only.table(1)[:4] == table[:4]
    assert (kv.only.num_own(0), kv.only.num_own(1), kv.only.pool.num_used) == (1, 1, 3)
    kv.check()
    kv.clear(1)
    kv.check()
    assert [g.at for g in kv.grow(0, 21)] == [5] and [g.at for g in kv.grow(1, 1)] == [0] and kv.only.num_own(1) == 1
    kv.free(0)
    kv.free(1)
    assert kv.only.pool.num_used == 0
    kv.check()


@pytest.mark.parametrize(("window", "unseen"), [(0, None), (9, None), (6, None), (5, 2), (4, 2), (2, 2), (1, 3)])
def test_of_a_prefix_only_the_window_must_be_there(window: int, unseen: int | None) -> None:
    kv = books(5, 4, window=window)
    kv.admit(0, [A, B, C], 12)
    kv.publish(0, 0, [A, B, C])
    kept = kv.only.refs(0)[2]
    kv.only.pool.hold(kept)
    kv.free(0)
    kv.only.pool.release(kv.only.pool.allocate(3))  # those of A and B are among them
    assert kv.found([A, B]).refs[0] == []
    if unseen is None:
        assert kv.found([A, B, C, D]).refs[0] == []
        return
    assert kv.found([A, B, C, D]).refs[0] == [UNSEEN] * unseen + [kept] * (3 - unseen)
    kv.only.pool.release((kept,))
    fits = [kv.fit([A, B, C, D], 20, spare=(spare,)) for spare in (unseen - 1, unseen)]
    assert fits == [Fit.YES, Fit.NO], "2 new ones, and those of 3 that are seen"
    assert kv.admit(1, [A, B, C, D], 20) == 3 and kv.only.table(1)[:unseen] == (DUMMY_BLOCK,) * unseen
    assert kv.only.pool.num_used == 5 - unseen and kv.fit([A, B, C, D], 20) is Fit.PROMISED
    kv.check()


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 5), st.integers(0, 24)), max_size=60),
    st.integers(0, 9),
)
def test_books_balance_whatever_comes_and_goes(steps: list[tuple[int, int, int, int]], window: int) -> None:
    kv, chains = books(10, 4, window=window), [[A, B, C], [A, B, D], [C, D], []]
    for slot, chain, blocks, position in steps:
        if slot in kv.slots and position < 4 * kv.only.num_blocks(slot):
            kv.slide(slot, position)
        elif slot in kv.slots:
            kv.free(slot)
        elif kv.fit(keys := chains[chain][: blocks - 1], 4 * blocks) is Fit.YES:
            found = kv.admit(slot, keys, 4 * blocks)
            kv.publish(slot, found, keys[found:])
        kv.check()
    for slot in kv.slots:
        kv.free(slot)
    kv.check()
    assert kv.only.pool.num_used == 0
