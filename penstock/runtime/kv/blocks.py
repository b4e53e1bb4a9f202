"""Which blocks of the KV pool are in use, and which still hold what may be wanted again: pure bookkeeping, no tensors.

A block holds `block_size` tokens of every layer of one state group. Block 0 is the dummy: padding rows read and write
it, so that padding needs no branch in any kernel; it is never handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from penstock.errors import ResourceError

DUMMY_BLOCK = 0


class BlockRef(NamedTuple):
    """One block while it keeps its contents: once handed out anew, `generation` is behind and the ref is stale."""

    block: int
    generation: int
    group: int = 0  # whose pool it is of


class BlockPool:
    """Blocks 1 .. num_blocks - 1. Each is held by one holder or several, or free; or idle: held by nobody, with
    contents that are known by a key. Idle blocks are handed out last, the one given back first before the others.
    """

    def __init__(self, num_blocks: int, block_size: int, group: int = 0) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ResourceError(
                f"a KV pool of {num_blocks} blocks of {block_size} tokens holds nothing: it needs at least 2 blocks "
                f"(one is the dummy for padding) of at least 1 token; give it more memory or a smaller block size"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.group = group
        self.evicting: Callable[[int, bytes], object] = lambda block, key: None  # hears of idle blocks handed out anew
        self.num_evicted = 0  # idle blocks that were handed out anew, since the start
        self._holders = [0] * num_blocks
        self._generations = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._blocks: dict[bytes, int] = {}  # by the key of their contents
        # A stack, so that a block just released is the next one written: a reader that holds on to it too long is found
        # out at once.
        self._free = list(range(num_blocks - 1, DUMMY_BLOCK, -1))
        self._idle: dict[int, None] = {}  # in the order in which they were given back

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out at all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_usable - self.num_free

    def holders(self, ref: BlockRef) -> int:
        """How many hold this block; a stale ref is a bug of the caller."""
        assert self._generations[ref.block] == ref.generation, f"stale {ref}: now {self._generations[ref.block]}"
        return self._holders[ref.block]

    def allocate(self, count: int) -> tuple[BlockRef, ...]:
        """Hand out `count` blocks, each to one holder; the caller has asked `num_free` before."""
        assert 0 <= count <= self.num_free, f"{count} blocks asked of {self.num_free} free ones"
        return tuple([self.take() for _ in range(count)])

    def take(self) -> BlockRef:
        """Hand out one."""
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            self._evict(block)
            self._generations[block] += 1
            self.num_evicted += 1
        assert not self._holders[block], f"block {block} was free and had {self._holders[block]} holders"
        self._holders[block] = 1
        return BlockRef(block, self._generations[block], self.group)

    def _evict(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None, f"block {block} was idle, and nobody could find it"
        self.evicting(block, key)
        self._forget(block)

    def find(self, key: bytes) -> BlockRef | None:
        """The block that holds the contents of this key, held or idle."""
        block = self._blocks.get(key)
        return None if block is None else BlockRef(block, self._generations[block], self.group)

    def hold(self, ref: BlockRef) -> None:
        """One holder more, of a block that is held or idle."""
        if not self.holders(ref):
            del self._idle[ref.block]
        self._holders[ref.block] += 1

    def release(self, refs: Iterable[BlockRef]) -> None:
        """One holder less of each. Who is left by the last is idle where its contents have a key, else free."""
        for ref in refs:
            assert self.holders(ref), f"{ref} is held by nobody"
            self._holders[ref.block] -= 1
            if not self._holders[ref.block]:
                self._rest(ref.block)

    def _rest(self, block: int) -> None:
        if self._keys[block] is not None:
            self._idle[block] = None
            return
        self._generations[block] += 1
        self._free.append(block)

    def publish(self, ref: BlockRef, key: bytes) -> None:
        """A held block's contents are those of `key`, and will not change. A key's first block is the one found."""
        assert self.holders(ref), f"{ref} is held by nobody"
        if self._keys[ref.block] is None and key not in self._blocks:
            self._keys[ref.block] = key
            self._blocks[key] = ref.block

    def withdraw(self, ref: BlockRef) -> None:
        """A block's contents turned out not to be what was published; nothing is left of them where it is stale."""
        if self._generations[ref.block] != ref.generation:
            return
        self._forget(ref.block)
        if ref.block in self._idle:
            del self._idle[ref.block]
            self._rest(ref.block)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._blocks[key]
            self._keys[block] = None

    def check(self) -> None:
        """Prove that every block is held, idle or free, just one of them, and the dummy none; and that keys agree."""
        held = [block for block, holders in enumerate(self._holders) if holders]
        every = sorted([*held, *self._free, *self._idle])
        assert every == list(range(1, self.num_blocks)), f"held {held}, free {self._free}, idle {[*self._idle]}"
        keyed = {block: key for block, key in enumerate(self._keys) if key is not None}
        assert {block: key for key, block in self._blocks.items()} == keyed, "a key without its block"
        assert all(block in keyed for block in self._idle), "an idle block that nobody can find"
        assert not any(block in keyed for block in self._free), "a free block that somebody can find"
