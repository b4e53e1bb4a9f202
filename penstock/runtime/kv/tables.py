"""The block tables of one group of layers: which blocks of its pool hold each slot's tokens, and how they grow.

Where the group's layers look through a window, a prompt gets its blocks chunk by chunk, and blocks wholly below the
window are given back while their request runs: steps in flight read nothing below their own windows, and whoever writes
there comes later. So such a pool may be far smaller than the texts are long.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from penstock.engine.groups import most_blocks
from penstock.runtime.kv.blocks import DUMMY_BLOCK, BlockPool, BlockRef
from penstock.runtime.kv.host import HostCache

UNSEEN = BlockRef(DUMMY_BLOCK, 0)  # an entry of a table that nobody reads
Refs = list[BlockRef | None]  # blocks by key, from the first on: UNSEEN where nobody reads it, None where in the host


class Rule(Enum):
    """How many blocks a slot holds while its text grows."""

    GROWS = "all: those of what is known at admission, then one after another"
    SLIDES = "those that the next token sees, and the chunk's: chunk by chunk"
    FIXED = "as many as at admission asked for, whatever the text's length; nobody finds them again"


class Grown(NamedTuple):
    """A block that a slot's table got, as its entry `at`."""

    slot: int
    at: int
    block: int
    group: int = 0


class Copy(NamedTuple):
    """A block whose contents another gets, before the step that this comes with runs."""

    source: int
    target: int
    group: int = 0


class Tables:
    """Tables over one pool, by slot."""

    def __init__(self, pool: BlockPool, window: int = 0, fixed: bool = False, host_blocks: int = 0) -> None:
        """`window`: a token sees itself and window - 1 before it; 0: all. `fixed`: tables do not follow the text.
        `host_blocks`: of the host's memory, for those evicted."""
        assert not (window and fixed), "what does not grow does not slide"
        self.pool, self.window = pool, window
        self.rule = Rule.SLIDES if window else Rule.FIXED if fixed else Rule.GROWS
        self.host = HostCache(host_blocks, pool.group)
        pool.evicting = self.host.save
        self._tables: dict[int, list[BlockRef]] = {}
        self._passed: dict[int, int] = {}  # by slot, how many of its table's first entries it does not hold

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens: the quotient rounded up."""
        return -(-num_tokens // self.pool.block_size)

    def most(self, num_tokens: int, chunk: int = 1) -> int:
        """Blocks that a text of so many tokens holds at most, of which a step takes `chunk`."""
        if self.rule is Rule.FIXED:
            return 0
        return most_blocks(num_tokens, self.pool.block_size, self.window, chunk)

    def first_seen(self, position: int) -> int:
        """The first block that a token at `position` sees; so do those behind it, or none that is older."""
        return max(0, position - self.window + 1) // self.pool.block_size if self.window else 0

    def find(self, keys: Sequence[bytes]) -> Refs:
        """The blocks of these keys, UNSEEN where there is none; without a window only up to the first such."""
        refs: Refs = []
        for key in keys:
            ref = self.pool.find(key)
            if ref is None and key not in self.host:
                if not self.window:
                    break
                ref = UNSEEN
            refs.append(ref)
        return refs

    def reached(self, refs: Refs, count: int) -> int:
        """The most of these first `count` keys behind which a token sees none that is missing."""
        while count and self.window:
            seen = min(self.first_seen(count * self.pool.block_size), count - 1)
            gap = next((i for i in range(count - 1, seen - 1, -1) if refs[i] is UNSEEN), None)
            if gap is None:
                break
            count = gap  # whoever stands between sees the gap too
        return count

    def wanted(self, refs: Refs, num_tokens: int, first: int | None, spare: int) -> int:
        """New blocks at admission, for a text of so many tokens of which these are found. One that slides wants those
        of its `first` tokens behind them (None: of all), or fewer where the pool has no more beside `spare` ones."""
        missing = refs.count(None)
        if self.rule is not Rule.SLIDES or first is None:
            return self.blocks_for(num_tokens) - len(refs) + missing
        reach = min(num_tokens, len(refs) * self.pool.block_size + first)
        new = self.blocks_for(reach) - len(refs) + missing
        held = len(refs) - missing - refs.count(UNSEEN)
        return min(new, max(self.pool.num_usable - held - spare, missing + 1))

    def fits(self, refs: Refs, wanted: int, spare: int) -> bool:
        """Whether so many new blocks are there beside those found, and `spare` are left for tables to grow by."""
        spare = 0 if self.rule is Rule.FIXED else spare
        idle = sum(not self.pool.holders(ref) for ref in refs if ref is not None and ref is not UNSEEN)
        return wanted + idle + spare <= self.pool.num_free

    def admit(self, slot: int, keys: Sequence[bytes], refs: Refs, wanted: int) -> None:
        """The table of a slot: what was found of these keys, and new blocks. The caller has asked `fits`."""
        passed = self._passed[slot] = self.first_seen(len(refs) * self.pool.block_size)
        self.host.hold([key for key, ref in zip(keys, refs, strict=False) if ref is None])
        for ref in refs[passed:]:
            if ref is not None:
                self.pool.hold(ref)
        new = iter(self.pool.allocate(wanted))
        table = [ref or self._restore(key, next(new)) for key, ref in zip(keys, refs, strict=False)]
        self._tables[slot] = [*table, *new]

    def _restore(self, key: bytes, ref: BlockRef) -> BlockRef:
        """A new block gets what the host has of this key, before the step that is planned; others may share it."""
        self.host.restore(key, ref)
        self.pool.publish(ref, key)
        return ref

    def lacks(self, slot: int, num_tokens: int) -> int:
        """Blocks that its table is short of so many tokens."""
        return 0 if self.rule is Rule.FIXED else self.blocks_for(num_tokens) - len(self._tables[slot])

    def grow(self, slot: int, num_tokens: int) -> list[Grown]:
        """The blocks that its table lacks, mostly one; the caller has asked the pool."""
        table, pool, grown = self._tables[slot], self.pool, []
        while len(table) * pool.block_size < num_tokens:
            ref = pool.take()
            grown.append(Grown(slot, len(table), ref.block, ref.group))
            table.append(ref)
        return grown

    def slide(self, slot: int, position: int) -> None:
        """Give back the blocks that no token from `position` on sees: the next to be computed. Entries stay."""
        table, passed = self._tables[slot], self._passed[slot]
        first = min(self.first_seen(position), len(table))
        if first > passed:
            self.pool.release(reversed(table[passed:first]))
            self._passed[slot] = first

    def fork(self, parent: int, child: int, num_tokens: int) -> Copy | None:
        """The child's table, empty so far, becomes one of the parent's first tokens: their full blocks are shared, and
        of the last, where it is not full, the child gets one to copy it to. The caller has asked the pool."""
        assert not self._tables[child], f"slot {child} already holds blocks"
        table, size = self._tables[parent], self.pool.block_size
        full, rest = (len(table), 0) if self.rule is Rule.FIXED else divmod(num_tokens, size)
        shared = table[:full]
        self._passed[child] = self._passed[parent]
        for ref in shared[self._passed[parent] :]:
            self.pool.hold(ref)
        own = self.pool.allocate(1 if rest else 0)
        self._tables[child] = [*shared, *own]
        return Copy(table[full].block, own[0].block, own[0].group) if rest else None

    def publish(self, slot: int, first: int, keys: Sequence[bytes]) -> tuple[BlockRef, ...]:
        """The slot's blocks from `first` on hold the tokens of these keys. What it has given back is another's."""
        if self.rule is Rule.FIXED:
            return ()
        passed = max(0, self._passed[slot] - first)
        keys = keys[passed:]
        refs = tuple(self._tables[slot][first + passed : first + passed + len(keys)])
        for ref, key in zip(refs, keys, strict=True):
            self.pool.publish(ref, key)
        return refs

    def clear(self, slot: int) -> None:
        """The slot's table becomes empty."""
        self.free(slot)
        self._tables[slot], self._passed[slot] = [], 0

    def free(self, slot: int) -> None:
        """Give the slot's blocks back, the last first: of what is found again, heads outlive tails."""
        self.pool.release(reversed(self.held(slot)))
        del self._tables[slot], self._passed[slot]

    def table(self, slot: int) -> tuple[int, ...]:
        """The block of each `block_size` positions, in order; block indices."""
        return tuple(ref.block for ref in self._tables[slot])

    def held(self, slot: int) -> list[BlockRef]:
        """Without those that it has given back."""
        return self._tables[slot][self._passed[slot] :]

    def refs(self, slot: int) -> tuple[BlockRef, ...]:
        """Of every entry, those that were given back too: of all that the slot's tokens were computed from."""
        return tuple(self._tables[slot])

    def num_blocks(self, slot: int) -> int:
        return len(self._tables[slot])

    def num_own(self, slot: int) -> int:
        """Blocks that nobody else holds."""
        return sum(self.pool.holders(ref) == 1 for ref in self.held(slot))

    @property
    def slots(self) -> frozenset[int]:
        """The slots that have a table."""
        return frozenset(self._tables)

    @property
    def usage(self) -> float:
        """Share of the usable blocks that is held, 0 to 1."""
        return self.pool.num_used / self.pool.num_usable

    def empty(self, lengths: dict[int, int]) -> int:
        """Places in held blocks without a token in them, given how many tokens each slot has there."""
        size = self.pool.block_size
        return sum(len(table) * size - lengths[slot] for slot, table in self._tables.items())

    def check(self) -> None:
        """Prove that tables and pool agree: each block has as many holders as tables list it, and none twice."""
        self.pool.check()
        self.host.check()
        listed: dict[BlockRef, int] = {}
        for table in map(self.held, self._tables):
            assert len(set(table)) == len(table), f"a table lists a block twice: {table}"
            for ref in table:
                listed[ref] = listed.get(ref, 0) + 1
        for ref, count in listed.items():
            assert self.pool.holders(ref) == count, (
                f"{ref} has {self.pool.holders(ref)} holders, {count} tables list it"
            )
        assert len(listed) == self.pool.num_used, f"tables list {len(listed)} blocks, {self.pool.num_used} are held"
