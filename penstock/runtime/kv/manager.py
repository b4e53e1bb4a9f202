"""Block tables: which blocks hold each slot's tokens, how they grow, and what two requests may share.

Full blocks of a prompt are found again by their keys (`kv.keys`), whether somebody still holds them or not. A block is
published when the step that fills it is planned: the device runs steps in order, so whoever is admitted later reads
what was written. Until then its key is promised, and who wants the same waits for it rather than compute it twice.

Where every layer looks through a window, blocks wholly below it are given back while their request runs: steps in
flight read nothing below their own windows, and whoever writes there comes later. A model that mixes such layers with
others keeps all, until groups of layers have pools of their own.

Blocks that the pool gave away may be found in the host's memory (`kv.host`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from penstock.runtime.kv.blocks import DUMMY_BLOCK, BlockPool, BlockRef
from penstock.runtime.kv.host import HostCache

UNSEEN = BlockRef(DUMMY_BLOCK, 0)  # an entry of a table that nobody reads
Found = list[BlockRef | None]  # blocks by key, from the first on: UNSEEN where nobody reads it, None where in the host


class Fit(Enum):
    """Whether a request can be admitted now."""

    YES = "yes"
    NO = "too few blocks are free"
    PROMISED = "somebody is computing its next block"


class Grown(NamedTuple):
    """A block that a slot's table got, as its entry `at`."""

    slot: int
    at: int
    block: int


class Copy(NamedTuple):
    """A block whose contents another gets, before the step that this comes with runs."""

    source: int
    target: int


class KvManager:
    """Tables over one pool, keyed by slot."""

    def __init__(self, pool: BlockPool, reuse: bool = True, window: int = 0, host_blocks: int = 0) -> None:
        """`reuse`: find the blocks of equal prefixes again; `host_blocks`: of the host's memory, for those evicted.
        `window`: a token sees itself and window - 1 before it, in every layer; 0: all. A prompt gets all its blocks at
        once, so the pool must hold a whole request nevertheless.
        """
        self.pool = pool
        self.host = HostCache(host_blocks)
        pool.evicting = self.host.save
        self.reuse = reuse
        self.window = window
        self._tables: dict[int, list[BlockRef]] = {}
        self._passed: dict[int, int] = {}  # by slot, how many of its table's first entries it does not hold
        self._promises: dict[bytes, int] = {}  # key -> the slot that will publish it
        self._promised: dict[int, Sequence[bytes]] = {}  # by slot, what it was to publish when it was admitted

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens: the quotient rounded up."""
        return -(-num_tokens // self.pool.block_size)

    def fits_pool(self, num_tokens: int) -> bool:
        """Whether the empty pool could hold them; otherwise waiting is in vain."""
        return self.blocks_for(num_tokens) <= self.pool.num_usable

    def first_seen(self, position: int) -> int:
        """The first block that a token at `position` sees; so do those behind it, or none that is older."""
        return max(0, position - self.window + 1) // self.pool.block_size if self.window else 0

    def found(self, keys: Sequence[bytes]) -> Found:
        """The blocks of as many keys from the first on as are there, or unseen by what follows them; None where only
        the host has it."""
        refs: Found = []
        missing = count = 0  # keys up to the last that is nowhere; keys that nothing is missing of
        for key in keys if self.reuse else ():
            ref = self.pool.find(key)
            if ref is None and key not in self.host:
                refs.append(UNSEEN)
                missing = len(refs)
            else:
                refs.append(ref)
                if missing <= self.first_seen(len(refs) * self.pool.block_size):
                    count = len(refs)
            if missing and not self.window:
                break
        seen = self.first_seen(count * self.pool.block_size)
        return [UNSEEN] * seen + refs[seen:count]

    def fit(self, keys: Sequence[bytes], num_tokens: int, spare: int = 0, found: Found | None = None) -> Fit:
        """Whether a table for `num_tokens` tokens can be made, of which full blocks have these keys (those that may be
        shared), and `spare` blocks be left. `found`: as of now, where it was asked already."""
        refs = self.found(keys) if found is None else found
        if len(refs) < len(keys) and self.reuse and keys[len(refs)] in self._promises:
            return Fit.PROMISED
        idle = sum(not self.pool.holders(ref) for ref in refs if ref is not None and ref is not UNSEEN)
        new = self.blocks_for(num_tokens) - len(refs) + refs.count(None)
        return Fit.YES if new + idle + spare <= self.pool.num_free else Fit.NO

    def admit(self, slot: int, keys: Sequence[bytes], num_tokens: int, found: Found | None = None) -> int:
        """Make the table of a slot; the caller has asked `fit`. Returns how many of its blocks hold their tokens."""
        assert slot not in self._tables, f"slot {slot} already holds blocks"
        refs = self.found(keys) if found is None else found
        self._passed[slot] = self.first_seen(len(refs) * self.pool.block_size)
        self.host.hold([key for key, ref in zip(keys, refs, strict=False) if ref is None])
        for ref in refs[self._passed[slot] :]:
            if ref is not None:
                self.pool.hold(ref)
        if self.reuse:
            self._promised[slot] = keys[len(refs) :]
            for key in self._promised[slot]:
                self._promises.setdefault(key, slot)
        new = iter(self.pool.allocate(self.blocks_for(num_tokens) - len(refs) + refs.count(None)))
        table = [ref or self._restore(key, next(new)) for key, ref in zip(keys, refs, strict=False)]
        self._tables[slot] = [*table, *new]
        return len(refs)

    def _restore(self, key: bytes, ref: BlockRef) -> BlockRef:
        """A new block gets what the host has of this key, before the step that is planned; others may share it."""
        self.host.restore(key, ref)
        self.pool.publish(ref, key)
        return ref

    def grow(self, slot: int) -> Grown:
        """One block more; the caller has asked the pool."""
        table = self._tables[slot]
        (ref,) = self.pool.allocate(1)
        table.append(ref)
        return Grown(slot, len(table) - 1, ref.block)

    def slide(self, slot: int, position: int) -> None:
        """Give back the blocks that no token from `position` on sees: the next to be computed. Entries stay."""
        first, passed = self.first_seen(position), self._passed[slot]
        if first > passed:
            self.pool.release(reversed(self._tables[slot][passed:first]))
            self._passed[slot] = first

    def fork(self, parent: int, child: int, num_tokens: int) -> Copy | None:
        """The child's table, empty so far, becomes one of the parent's first tokens: their full blocks are shared, and
        of the last, where it is not full, the child gets one to copy it to. The caller has asked the pool."""
        assert not self._tables[child], f"slot {child} already holds blocks"
        full, rest = divmod(num_tokens, self.pool.block_size)
        shared = self._tables[parent][:full]
        self._passed[child] = self._passed[parent]
        for ref in shared[self._passed[parent] :]:
            self.pool.hold(ref)
        own = self.pool.allocate(1 if rest else 0)
        self._tables[child] = [*shared, *own]
        return Copy(self._tables[parent][full].block, own[0].block) if rest else None

    def clear(self, slot: int) -> None:
        """The slot's table becomes empty."""
        self.free(slot)
        self._tables[slot], self._passed[slot] = [], 0

    def publish(self, slot: int, first: int, keys: Sequence[bytes]) -> tuple[BlockRef, ...]:
        """The slot's blocks from `first` on hold the tokens of these keys, once the steps planned so far have run."""
        if not self.reuse:
            return ()
        passed = max(0, self._passed[slot] - first)
        keys = keys[passed:]
        refs = tuple(self._tables[slot][first + passed : first + passed + len(keys)])
        for ref, key in zip(refs, keys, strict=True):
            self.pool.publish(ref, key)
            if self._promises.get(key) == slot:
                del self._promises[key]
        return refs

    def withdraw(self, refs: Iterable[BlockRef]) -> None:
        """What was published of these blocks is not there: the step that was to write it failed."""
        for ref in refs:
            self.pool.withdraw(ref)

    def break_promises(self, slot: int) -> None:
        """The slot's request will compute nothing more."""
        for key in self._promised.pop(slot, ()):
            if self._promises.get(key) == slot:
                del self._promises[key]

    def free(self, slot: int) -> None:
        """Give the slot's blocks back, the last first: of what is found again, heads outlive tails."""
        self.break_promises(slot)
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
        """The slots that hold blocks."""
        return frozenset(self._tables)

    @property
    def usage(self) -> float:
        """Share of the usable blocks that is held, 0 to 1."""
        return self.pool.num_used / self.pool.num_usable

    def waste(self, lengths: dict[int, int]) -> float:
        """Share of the held blocks' room without a token in it, given how many tokens each slot has there; 0 to 1."""
        size = self.pool.block_size
        empty = sum(len(table) * size - lengths[slot] for slot, table in self._tables.items())
        return empty / (self.pool.num_used * size) if self._tables else 0.0

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
        assert set(self._promises.values()) <= self._tables.keys(), "a promise of nobody"
