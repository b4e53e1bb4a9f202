"""Blocks of every group of layers: who gets them, and what two requests may share.

Full blocks of a prompt are found again by their keys (`kv.keys`), whether somebody still holds them or not, where every
group has what the tokens behind them see. A block is published when the step that fills it is planned: the device runs
steps in order, so whoever is admitted later reads what was written. Until then its key is promised, and who wants the
same waits for it rather than compute it twice.

Blocks that a pool gave away may be found in the host's memory (`kv.host`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import repeat
from typing import NamedTuple

from penstock.runtime.kv.blocks import BlockRef
from penstock.runtime.kv.host import NO_MOVES, Moves
from penstock.runtime.kv.tables import UNSEEN, Copy, Grown, Refs, Rule, Tables

ENDLESS = 1 << 30  # tokens of a block where there are none


class Fit(Enum):
    """Whether a request can be admitted now."""

    YES = "yes"
    NO = "too few blocks are free"
    PROMISED = "somebody is computing its next block"


class Found(NamedTuple):
    """As many keys from the first on have their blocks, of each group those that the tokens behind them see."""

    num: int
    refs: tuple[Refs, ...]


class KvManager:
    """The groups' tables, as one. Blocks of all groups hold equally many tokens."""

    def __init__(self, groups: Sequence[Tables], reuse: bool = True, by_slot: bool = False) -> None:
        """`reuse`: find the blocks of equal prefixes again. `by_slot`: there is state besides, one a slot, of which
        nobody knows what it was some tokens ago: it is neither found again nor forked."""
        assert not (reuse and by_slot), "a prefix is of no use without the state behind it"
        assert [tables.pool.group for tables in groups] == list(range(len(groups)))
        self.groups, self.reuse, self.by_slot = tuple(groups), reuse, by_slot
        self.block_size = groups[0].pool.block_size if groups else ENDLESS
        assert all(tables.pool.block_size == self.block_size for tables in groups)
        self.slides = any(tables.rule is Rule.SLIDES for tables in groups)
        self._following = tuple(tables for tables in groups if tables.rule is not Rule.FIXED)
        self._slots: set[int] = set()
        self._promises: dict[bytes, int] = {}  # key -> the slot that will publish it
        self._promised: dict[int, Sequence[bytes]] = {}  # by slot, what it was to publish when it was admitted

    def fits_pools(self, num_tokens: int) -> bool:
        """Whether the empty pools could run such a text; otherwise waiting is in vain."""
        return all(tables.most(num_tokens) <= tables.pool.num_usable for tables in self.groups)

    @property
    def num_free(self) -> int:
        """Blocks that every group can hand out now."""
        return min([tables.pool.num_free for tables in self._following], default=ENDLESS)

    def short_of(self, count: int, leaving: Iterable[int]) -> bool:
        """Whether so many blocks of each group are not there, even when these slots have given up their own."""
        return any([t.pool.num_free + sum(map(t.num_own, leaving)) < count for t in self._following])

    def found(self, keys: Sequence[bytes]) -> Found:
        """What there is of these keys, in the pools or the host's memory."""
        every: list[Refs] = [[] for _ in self.groups]
        for tables in self._following if self.reuse else ():
            every[tables.pool.group] = refs = tables.find(keys)
            keys = keys[: len(refs)]
        count, before = len(keys) if self.reuse and self._following else 0, -1
        while count != before:  # what one group reaches may be too far for another
            before = count
            for tables in self._following:
                count = tables.reached(every[tables.pool.group], count)
        return Found(count, tuple([self._seen(*each, count) for each in zip(self.groups, every, strict=True)]))

    def _seen(self, tables: Tables, refs: Refs, count: int) -> Refs:
        seen = tables.first_seen(count * self.block_size)
        return [] if tables.rule is Rule.FIXED else [*[UNSEEN] * seen, *refs[seen:count]]

    def fit(
        self, keys: Sequence[bytes], num_tokens: int, spare: Sequence[int] = (), found: Found | None = None,
        first: int | None = None, fixed: int = 0,
    ) -> Fit:  # fmt: skip
        """Whether tables for `num_tokens` tokens can be made, of which full blocks have these keys (those that may be
        shared), and of each group `spare` blocks be left. `found`: as of now, where it was asked already. `first`: how
        many tokens of the rest its first step takes; None: all. `fixed`: tokens of what does not follow the text."""
        found = self.found(keys) if found is None else found
        if found.num < len(keys) and self.reuse and keys[found.num] in self._promises:
            return Fit.PROMISED
        asked = zip(self.groups, found.refs, spare or repeat(0), strict=False)
        fits = [t.fits(refs, _wanted(t, refs, num_tokens, first, left, fixed), left) for t, refs, left in asked]
        return Fit.YES if all(fits) else Fit.NO

    def admit(
        self, slot: int, keys: Sequence[bytes], num_tokens: int, spare: Sequence[int] = (), found: Found | None = None,
        first: int | None = None, fixed: int = 0,
    ) -> int:  # fmt: skip
        """Make the tables of a slot; the caller has asked `fit`. Returns how many blocks' tokens are not
        to be computed."""
        assert slot not in self._slots, f"slot {slot} already holds blocks"
        self._slots.add(slot)
        found = self.found(keys) if found is None else found
        if self.reuse:
            self._promised[slot] = keys[found.num :]
            for key in self._promised[slot]:
                self._promises.setdefault(key, slot)
        for tables, refs, left in zip(self.groups, found.refs, spare or repeat(0), strict=False):
            tables.admit(slot, keys, refs, _wanted(tables, refs, num_tokens, first, left, fixed))
        return found.num

    def lacks(self, slot: int, num_tokens: int) -> bool:
        """Whether a table is short of so many tokens."""
        return any([tables.lacks(slot, num_tokens) > 0 for tables in self._following])

    def reach(self, slot: int, num_tokens: int, spare: int = 0) -> int:
        """Tokens, no more than these, that its tables hold if they grow, and `spare` blocks of each group are left."""
        for tables in self._following if self.slides else ():
            room = tables.num_blocks(slot) + max(0, tables.pool.num_free - spare)
            num_tokens = min(num_tokens, room * self.block_size)
        return num_tokens

    def grow(self, slot: int, num_tokens: int) -> list[Grown]:
        """The blocks that its tables lack of so many tokens; the caller has asked the pools."""
        if len(self._following) == 1:
            return self._following[0].grow(slot, num_tokens)
        return [each for tables in self._following for each in tables.grow(slot, num_tokens)]

    def slide(self, slot: int, position: int) -> None:
        """Give back the blocks that no token from `position` on sees: the next to be computed. Entries stay."""
        for tables in self.groups:
            if tables.window:
                tables.slide(slot, position)

    def fork(self, parent: int, child: int, num_tokens: int) -> tuple[Copy, ...]:
        """The child's tables, empty so far, become those of the parent's first tokens. What is to be copied."""
        assert not self.by_slot, "what is kept by slot cannot be forked"
        return tuple([copy for tables in self.groups if (copy := tables.fork(parent, child, num_tokens))])

    def clear(self, slot: int) -> None:
        """The slot's tables become empty."""
        self.break_promises(slot)
        for tables in self.groups:
            tables.clear(slot)

    def publish(self, slot: int, first: int, keys: Sequence[bytes]) -> list[BlockRef]:
        """The slot's blocks from `first` on hold the tokens of these keys, once the steps planned so far have run."""
        if not self.reuse:
            return []
        for key in keys:
            if self._promises.get(key) == slot:
                del self._promises[key]
        return [ref for tables in self.groups for ref in tables.publish(slot, first, keys)]

    def withdraw(self, refs: Iterable[BlockRef]) -> None:
        """What was published of these blocks is not there: the step that was to write it failed."""
        for ref in refs:
            self.groups[ref.group].pool.withdraw(ref)

    def withdraw_hosts(self, hosts: Iterable[tuple[int, int]]) -> None:
        """(group, block of the host): nor are these."""
        for group, host_block in hosts:
            self.groups[group].host.withdraw((host_block,))

    def take_moves(self) -> Moves:
        """Between pools and host, of the plan that is made now."""
        moves = [each for tables in self.groups if (each := tables.host.take()) is not NO_MOVES]
        if len(moves) < 2:
            return moves[0] if moves else NO_MOVES
        return Moves(
            tuple([each for of in moves for each in of.saved]),
            tuple([each for of in moves for each in of.restored]),
            tuple([each for of in moves for each in of.refs]),
        )

    def break_promises(self, slot: int) -> None:
        """The slot's request will compute nothing more."""
        for key in self._promised.pop(slot, ()):
            if self._promises.get(key) == slot:
                del self._promises[key]

    def free(self, slot: int) -> None:
        """Give the slot's blocks back."""
        self.break_promises(slot)
        self._slots.remove(slot)
        for tables in self.groups:
            tables.free(slot)

    def tables(self, slot: int) -> tuple[tuple[int, ...], ...]:
        """Its block table of each group."""
        return tuple([tables.table(slot) for tables in self.groups])

    def refs(self, slot: int) -> set[BlockRef]:
        """All that the slot's tokens were computed from."""
        return {ref for tables in self.groups for ref in tables.refs(slot)}

    @property
    def slots(self) -> frozenset[int]:
        """The slots that have tables."""
        return frozenset(self._slots)

    @property
    def num_usable(self) -> int:
        """Blocks that hold a text, one that no window cuts where there are such layers."""
        whole = [t.pool.num_usable for t in self._following if not t.window]
        return min(whole or [t.pool.num_usable for t in self._following], default=0)

    @property
    def num_evicted(self) -> int:
        """Blocks of all groups, since the start."""
        return sum(tables.pool.num_evicted for tables in self.groups)

    @property
    def num_restored(self) -> int:
        """Blocks of the host's memory that were used, since the start: of the group of which most were."""
        return max((tables.host.num_restored for tables in self.groups), default=0)

    @property
    def host_blocks(self) -> int:
        """Of the host's memory, for each group as many."""
        return self.groups[0].host.num_blocks if self.groups else 0

    @property
    def host_usage(self) -> float:
        """Share of them that hold something, 0 to 1."""
        return max((tables.host.usage for tables in self.groups), default=0.0)

    @property
    def usage(self) -> float:
        """Share of the usable blocks that is held, 0 to 1: of the group that has least left."""
        return max((tables.usage for tables in self.groups), default=0.0)

    def waste(self, lengths: dict[int, int]) -> float:
        """Share of the held blocks' room without a token in it, given how many tokens each slot has there; 0 to 1."""
        room = sum(tables.pool.num_used for tables in self._following) * self.block_size
        return sum(tables.empty(lengths) for tables in self._following) / room if room else 0.0

    def check(self) -> None:
        """Prove that tables and pools agree, and that the groups know the same slots."""
        for tables in self.groups:
            tables.check()
            assert tables.slots == self._slots, f"tables of {tables.slots}, slots {self._slots}"
        assert set(self._promises.values()) <= self._slots, "a promise of nobody"


def _wanted(tables: Tables, refs: Refs, num_tokens: int, first: int | None, spare: int, fixed: int) -> int:
    return tables.wanted(refs, fixed if tables.rule is Rule.FIXED else num_tokens, first, spare)
