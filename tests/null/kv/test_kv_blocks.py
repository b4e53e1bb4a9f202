"""The KV pool: every block held, idle or free; stale refs found out; contents found again by their keys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ResourceError
from penstock.runtime.kv.blocks import DUMMY_BLOCK, BlockPool
from penstock.runtime.kv.keys import extend_keys
from penstock.runtime.kv.manager import Fit, Grown, KvManager

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
    kv = KvManager(BlockPool(8, 4))
    assert kv.fit([A, B], 11) is Fit.YES and kv.admit(0, [A, B], 11) == 0
    assert kv.fit([A, C], 9) is Fit.PROMISED, "slot 0 is to compute A"
    kv.publish(0, 0, [A])
    assert kv.fit([A, B], 11) is Fit.PROMISED and kv.fit([A, C], 9) is Fit.YES
    assert kv.admit(1, [A, C], 9) == 1 and kv.table(1)[0] == kv.table(0)[0]
    assert (kv.pool.num_used, kv.num_own(0), kv.num_own(1)) == (5, 2, 2)
    assert kv.waste({0: 4, 1: 6}) == pytest.approx(14 / 20)
    kv.check()
    kv.break_promises(0)
    assert kv.fit([A, B], 11) is Fit.YES and kv.fit([A, B], 11, spare=1) is Fit.NO
    kv.free(0)
    assert kv.fit([A, B], 11, spare=2) is Fit.YES
    assert kv.grow(1) == Grown(1, 3, kv.table(1)[3])
    kv.free(1)
    assert kv.found([A, B]) and kv.usage == 0 and kv.waste({}) == 0
    kv.check()


def test_a_fork_shares_full_blocks_and_gets_one_for_the_rest() -> None:
    kv = KvManager(BlockPool(8, 4))
    kv.admit(0, [A], 7)
    for slot in (1, 2):
        kv.admit(slot, (), 0)
    assert kv.fork(0, 1, 7) == (kv.table(0)[1], kv.table(1)[1]) and kv.table(1)[0] == kv.table(0)[0]
    assert kv.fork(0, 2, 4) is None and kv.table(2) == kv.table(0)[:1]
    assert (kv.pool.num_used, kv.num_own(0), kv.num_own(1), kv.num_own(2)) == (3, 1, 1, 0)
    kv.check()
    with pytest.raises(AssertionError, match="slot 1 already holds blocks"):
        kv.fork(0, 1, 7)
    kv.clear(0)
    assert kv.table(0) == () and kv.pool.num_used == 2 and kv.fork(1, 0, 6) == (kv.table(1)[1], kv.table(0)[1])
    for slot in kv.slots:
        kv.free(slot)
    kv.check()
    assert kv.pool.num_used == 0


def test_without_reuse_nothing_is_found_or_waited_for() -> None:
    kv = KvManager(BlockPool(8, 4), reuse=False)
    kv.admit(0, [A, B], 11)
    assert kv.publish(0, 0, [A, B]) == () and kv.fit([A], 5) is Fit.YES and kv.admit(1, [A], 5) == 0
    kv.check()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 5)), max_size=60))
def test_books_balance_whatever_comes_and_goes(steps: list[tuple[int, int, int]]) -> None:
    kv, chains = KvManager(BlockPool(10, 4)), [[A, B, C], [A, B, D], [C, D], []]
    for slot, chain, blocks in steps:
        if slot in kv.slots:
            kv.free(slot)
        elif kv.fit(keys := chains[chain][: blocks - 1], 4 * blocks) is Fit.YES:
            found = kv.admit(slot, keys, 4 * blocks)
            kv.publish(slot, found, keys[found:])
        kv.check()
    for slot in kv.slots:
        kv.free(slot)
    kv.check()
    assert kv.pool.num_used == 0
