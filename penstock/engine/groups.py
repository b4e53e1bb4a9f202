"""Groups of states: layers of one class and size, which share a pool of blocks, its tables and its rules. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from penstock.ir.graph import Node

BY_SLOT = "slots"  # the class of states that have a place for each slot, [num_slots, ...], and no blocks
PREFIX = "prefix"  # the class of those in which a prompt's first tokens see each other, and so are computed at once
CROSS = "cross"  # the class of what an encoder made of a request's input, which does not grow with its text


@dataclass(frozen=True)
class StateGroup:
    """`name`: its class (paged, prefix, windowed, cross, slots) and number, as its states bear it. `window`: a token
    sees itself and window - 1 before it, in each of these layers; 0: all."""

    name: str
    window: int
    states: tuple[Node, ...]

    @property
    def kind(self) -> str:
        return self.name.rstrip("0123456789")

    @property
    def by_slot(self) -> bool:
        return self.kind == BY_SLOT

    @property
    def fixed(self) -> bool:
        return self.kind == CROSS

    @property
    def whole(self) -> bool:
        return self.kind == PREFIX

    @property
    def unit_bytes(self) -> int:
        """Of a block, or of a slot, over all its layers."""
        return sum(node.types[0].nbytes({"N": 1}) for node in self.states)

    def blocks(self, num_tokens: int, block_size: int, chunk: int = 1) -> int:
        """Blocks that a text of so many tokens holds at most, of which a step takes `chunk`."""
        return most_blocks(num_tokens, block_size, self.window, chunk)

    def request_bytes(self, num_tokens: int, block_size: int, chunk: int = 1) -> int:
        """Of these, or of its one slot."""
        return self.unit_bytes * (1 if self.by_slot else self.blocks(num_tokens, block_size, chunk))


def most_blocks(num_tokens: int, block_size: int, window: int, chunk: int = 1) -> int:
    """As `StateGroup.blocks`: what a window and a chunk reach over, wherever in a block they begin."""
    whole = -(-num_tokens // block_size)
    return min(whole, 1 - (2 - window - chunk) // block_size) if window else whole


def groups_of(states: Iterable[Node]) -> tuple[StateGroup, ...]:
    """By their numbers."""
    found: dict[tuple[str, int], list[Node]] = {}
    for node in states:
        attrs = dict(node.attrs)
        found.setdefault((str(attrs.get("group", "paged0")), int(str(attrs.get("window", 0)))), []).append(node)
    groups = (StateGroup(*key, tuple(nodes)) for key, nodes in found.items())
    return tuple(sorted(groups, key=lambda group: int(group.name[len(group.kind) :])))
