"""Which block of the KV pool belongs to whom: pure bookkeeping, no tensors.

A block holds `block_size` tokens of every layer of one state group. Block 0 is the dummy: padding rows read and write
it, so that padding needs no branch in any kernel; it is never handed out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from penstock.errors import ResourceError

DUMMY_BLOCK = 0


class BlockRef(NamedTuple):
    """One block while one owner holds it: once the block is released, `generation` is behind and the ref is stale."""

    block: int
    generation: int


class BlockPool:
    """Blocks 1 .. num_blocks - 1, each free or held by exactly one owner (a slot)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ResourceError(
                f"a KV pool of {num_blocks} blocks of {block_size} tokens holds nothing: it needs at least 2 blocks "
                f"(one is the dummy for padding) of at least 1 token; give it more memory or a smaller block size"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._owners: list[int | None] = [None] * num_blocks
        self._generations = [0] * num_blocks
        # A stack, so that a block just released is the next one written: a reader that holds on to it too long is found
        # out at once.
        self._free = list(range(num_blocks - 1, DUMMY_BLOCK, -1))

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out at all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_usable - self.num_free

    def allocate(self, count: int, owner: int) -> tuple[BlockRef, ...]:
        """Give `count` blocks to `owner`; the caller has asked `num_free` before."""
        assert 0 <= count <= self.num_free, f"{count} blocks asked of {self.num_free} free ones"
        rest = self.num_free - count
        taken = self._free[rest:]
        del self._free[rest:]
        taken.reverse()  # as one by one from the top
        for block in taken:
            assert self._owners[block] is None, f"block {block} was free and owned by {self._owners[block]}"
            self._owners[block] = owner
        return tuple(BlockRef(block, self._generations[block]) for block in taken)

    def owner(self, ref: BlockRef) -> int:
        """Who holds this block; a stale ref is a bug of the caller."""
        assert self._generations[ref.block] == ref.generation, f"stale {ref}: now {self._generations[ref.block]}"
        owner = self._owners[ref.block]
        assert owner is not None, f"{ref} was never allocated"
        return owner

    def release(self, refs: Iterable[BlockRef], owner: int) -> None:
        """Take blocks back from `owner`; from now on every copy of these refs is stale."""
        for ref in refs:
            assert self.owner(ref) == owner, f"{ref} belongs to {self.owner(ref)}, not to {owner}"
            self._owners[ref.block] = None
            self._generations[ref.block] += 1
            self._free.append(ref.block)

    def check(self) -> None:
        """Prove that every block is either free once or owned once, and the dummy neither."""
        owned = [index for index, owner in enumerate(self._owners) if owner is not None]
        assert sorted(owned + self._free) == list(range(1, self.num_blocks)), f"owned {owned}, free {self._free}"


class KvManager:
    """Reservations of whole lengths out of one pool, keyed by slot, so that a running request never lacks a block."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self._tables: dict[int, tuple[BlockRef, ...]] = {}
        self._tokens: dict[int, int] = {}

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens: the quotient rounded up."""
        return -(-num_tokens // self.pool.block_size)

    def fits_pool(self, num_tokens: int) -> bool:
        """Whether the empty pool could hold them; otherwise waiting is in vain."""
        return self.blocks_for(num_tokens) <= self.pool.num_usable

    def fits_now(self, num_tokens: int) -> bool:
        return self.blocks_for(num_tokens) <= self.pool.num_free

    def reserve(self, slot: int, num_tokens: int) -> tuple[int, ...]:
        """Reserve room for `num_tokens` tokens of `slot`; returns its block table. The caller has asked `fits_now`."""
        assert slot not in self._tables, f"slot {slot} already holds blocks"
        self._tables[slot] = self.pool.allocate(self.blocks_for(num_tokens), slot)
        self._tokens[slot] = num_tokens
        return self.table(slot)

    def table(self, slot: int) -> tuple[int, ...]:
        """The block of each `block_size` positions, in order; block indices."""
        return tuple(ref.block for ref in self._tables[slot])

    def free(self, slot: int) -> None:
        self.pool.release(self._tables.pop(slot), slot)
        del self._tokens[slot]

    @property
    def slots(self) -> frozenset[int]:
        """The slots that hold blocks."""
        return frozenset(self._tables)

    @property
    def num_reserved_tokens(self) -> int:
        return sum(self._tokens.values())

    @property
    def usage(self) -> float:
        """Share of the usable blocks that is reserved, 0 to 1."""
        return self.pool.num_used / self.pool.num_usable

    @property
    def packing(self) -> float:
        """Share of the reserved blocks' room that was asked for (the rest is rounding up); 1 if none is."""
        return self.num_reserved_tokens / (self.pool.num_used * self.pool.block_size) if self._tables else 1.0

    def check(self) -> None:
        """Prove that tables and pool agree: a listed block is its slot's, and no block is owned outside a table."""
        self.pool.check()
        for slot, table in self._tables.items():
            assert all(self.pool.owner(ref) == slot for ref in table), f"slot {slot} lists a block of another"
        held = sum(len(table) for table in self._tables.values())
        assert held == self.pool.num_used, f"tables list {held} blocks, the pool gave out {self.pool.num_used}"
