"""The KV pool: every block owned once or free, stale refs found out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ResourceError
from penstock.runtime.kv.blocks import DUMMY_BLOCK, BlockPool, BlockRef, KvManager


def test_dummy_block_is_never_handed_out() -> None:
    pool = BlockPool(5, 16)
    refs = pool.allocate(4, owner=0)
    assert sorted(ref.block for ref in refs) == [1, 2, 3, 4]
    assert DUMMY_BLOCK not in {ref.block for ref in refs}
    assert (pool.num_usable, pool.num_used, pool.num_free) == (4, 4, 0)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 16), (0, 16), (4, 0)])
def test_pool_that_holds_nothing_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ResourceError, match=f"{num_blocks} blocks of {block_size} tokens"):
        BlockPool(num_blocks, block_size)


def test_over_allocation_is_our_bug() -> None:
    pool = BlockPool(4, 16)
    pool.allocate(2, owner=0)
    with pytest.raises(AssertionError, match="2 blocks asked of 1"):
        pool.allocate(2, owner=1)


def test_stale_refs_are_found_out() -> None:
    pool = BlockPool(4, 16)
    old = pool.allocate(1, owner=7)
    assert pool.owner(old[0]) == 7
    pool.release(old, owner=7)
    with pytest.raises(AssertionError, match="stale"):
        pool.release(old, owner=7)
    again = pool.allocate(1, owner=7)
    assert again[0].block == old[0].block
    with pytest.raises(AssertionError, match="stale"):
        pool.owner(old[0])
    assert pool.owner(again[0]) == 7


def test_only_the_owner_releases() -> None:
    pool = BlockPool(4, 16)
    refs = pool.allocate(1, owner=1)
    with pytest.raises(AssertionError, match="belongs to 1, not to 2"):
        pool.release(refs, owner=2)
    with pytest.raises(AssertionError, match="never allocated"):
        pool.owner(BlockRef(DUMMY_BLOCK, 0))


def test_check_finds_a_lost_and_a_doubled_block() -> None:
    lost, doubled = BlockPool(4, 16), BlockPool(4, 16)
    lost._free.pop()
    doubled._free.append(doubled._free[0])
    for pool in (lost, doubled):
        with pytest.raises(AssertionError):
            pool.check()


def test_manager_rounds_up_and_counts() -> None:
    kv = KvManager(BlockPool(9, 4))
    assert [kv.blocks_for(n) for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
    assert (kv.usage, kv.packing) == (0.0, 1.0)
    table = kv.reserve(3, 9)
    assert len(table) == len(set(table)) == 3 and table == kv.table(3)
    assert kv.usage == 3 / 8 and kv.packing == 9 / 12 and kv.num_reserved_tokens == 9
    assert kv.fits_now(20) and not kv.fits_now(21) and kv.fits_pool(32) and not kv.fits_pool(33)
    with pytest.raises(AssertionError, match="slot 3 already"):
        kv.reserve(3, 1)
    kv.free(3)
    assert kv.usage == 0.0 and kv.slots == frozenset()
    kv.check()


def test_manager_check_finds_a_block_outside_the_tables() -> None:
    kv = KvManager(BlockPool(9, 4))
    kv.pool.allocate(1, owner=0)
    with pytest.raises(AssertionError, match="tables list 0 blocks"):
        kv.check()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), max_size=40))
def test_tables_stay_disjoint(moves: list[tuple[int, int]]) -> None:
    kv = KvManager(BlockPool(17, 4))
    for slot, num_tokens in moves:
        if slot in kv.slots:
            kv.free(slot)
        elif kv.fits_now(num_tokens):
            kv.reserve(slot, num_tokens)
        kv.check()
        blocks = [block for held in kv.slots for block in kv.table(held)]
        assert len(blocks) == len(set(blocks)) == kv.pool.num_used and DUMMY_BLOCK not in blocks
    for slot in kv.slots:
        kv.free(slot)
    assert kv.pool.num_free == kv.pool.num_usable
