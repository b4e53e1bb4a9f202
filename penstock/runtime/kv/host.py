"""Memory of the host for KV blocks that a group's pool had to give away: which block of it holds what. No tensors.

Its blocks are found by the same keys, the least recently used makes room. What a step's plan evicts is copied here, and
what it finds here is copied to blocks of the pool, both before the step runs and after all steps before it: so contents
are believed from the plan on, and a block of the host may be overwritten by the next plan. A key may be in both places:
when the pool evicts it again, nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from penstock.runtime.kv.blocks import BlockRef


class Saved(NamedTuple):
    """A block of the pool, and that of the host which gets its contents."""

    block: int
    host_block: int
    group: int = 0


class Restored(NamedTuple):
    """A block of the host, and that of the pool which gets its contents."""

    host_block: int
    block: int
    group: int = 0


class Moves(NamedTuple):
    """The copies of one plan: first all that are `saved`, no block of the host twice, then all that are `restored`, to
    the blocks `refs`."""

    saved: tuple[Saved, ...]
    restored: tuple[Restored, ...]
    refs: tuple[BlockRef, ...]


NO_MOVES = Moves((), (), ())


class HostCache:
    """Blocks 0 .. num_blocks - 1 of the host's memory; with none, nothing is kept."""

    def __init__(self, num_blocks: int = 0, group: int = 0) -> None:
        self.num_blocks, self.group = num_blocks, group
        self.num_restored = 0  # blocks, since the start
        self._free = list(range(num_blocks - 1, -1, -1))
        self._keys: list[bytes | None] = [None] * num_blocks
        self._blocks: dict[bytes, int] = {}  # by the key of their contents, the least recently used first
        # Of the plan being made. Copies out come first, so what is to be copied back must not make room for them.
        self._saved: dict[int, int] = {}  # by block of the host
        self._restored: list[tuple[int, BlockRef]] = []
        self._held: set[int] = set()

    @property
    def usage(self) -> float:
        """Share of the blocks that hold something, 0 to 1."""
        return len(self._blocks) / self.num_blocks if self.num_blocks else 0.0

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def save(self, block: int, key: bytes) -> None:
        """The pool gives this block to somebody else. What it holds is kept, unless the plan needs all blocks here."""
        if key in self._blocks:
            self._touch(key)
        elif (host_block := self._room()) is not None:
            self._keys[host_block] = key
            self._blocks[key] = host_block
            self._saved[host_block] = block

    def _room(self) -> int | None:
        if not self._free:
            oldest = next((block for block in self._blocks.values() if block not in self._held), None)
            if oldest is None:
                return None
            self._forget(oldest)
        return self._free.pop()

    def hold(self, keys: Sequence[bytes]) -> None:
        """Keep what is found of these keys until the plan is made; of one prefix, heads outlive tails."""
        for key in reversed(keys):
            self._touch(key)
            self._held.add(self._blocks[key])

    def restore(self, key: bytes, ref: BlockRef) -> None:
        """Copy what was found, and is held, to this block of the pool."""
        assert self._blocks[key] in self._held, "it may be overwritten before it is copied"
        self._restored.append((self._blocks[key], ref))
        self.num_restored += 1

    def take(self) -> Moves:
        """The copies of the plan that is made now."""
        if not (self._saved or self._restored or self._held):
            return NO_MOVES
        saved = tuple([Saved(block, host_block, self.group) for host_block, block in self._saved.items()])
        restored = tuple([Restored(host_block, ref.block, self.group) for host_block, ref in self._restored])
        moves = Moves(saved, restored, tuple([ref for _, ref in self._restored]))
        self._saved, self._restored, self._held = {}, [], set()
        return moves

    def withdraw(self, host_blocks: Iterable[int]) -> None:
        """These do not hold what they should: the step that was to save it failed."""
        for host_block in host_blocks:
            self._saved.pop(host_block, None)
            if self._keys[host_block] is not None:
                self._forget(host_block)

    def _touch(self, key: bytes) -> None:
        self._blocks[key] = self._blocks.pop(key)

    def _forget(self, host_block: int) -> None:
        key = self._keys[host_block]
        assert key is not None, f"block {host_block} of the host holds nothing"
        del self._blocks[key]
        self._keys[host_block] = None
        self._free.append(host_block)

    def check(self) -> None:
        """Prove that every block is free or found by one key, and that copies under way concern the latter."""
        keyed = {block: key for block, key in enumerate(self._keys) if key is not None}
        assert {block: key for key, block in self._blocks.items()} == keyed, "a key without its block"
        assert sorted([*self._free, *keyed]) == list(range(self.num_blocks)), f"free {self._free}, held {[*keyed]}"
        assert self._saved.keys() | self._held <= keyed.keys(), "a copy of what nobody can find"
