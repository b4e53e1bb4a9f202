"""Lifetimes to offsets: every value of a step gets its place in one arena, which is never allocated from again.

The phases of a program are planned as one sequence. A result that a later phase reads by name lives until then.
Offsets depend on the bucket's sizes alone, so they are planned once, stored, and the same on every start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from penstock.engine.program import Phase, Sizes
from penstock.ir.graph import Node, Value
from penstock.ir.op import get

ALIGN = 256  # bytes
ALIASED = -1  # the offset of a value that lives in another's memory, or outside the arena
Offsets = dict[str, tuple[int, ...]]


@dataclass
class Arena:
    """First fit over free spans; `top` is the most that was ever in use."""

    free: list[tuple[int, int]] = field(default_factory=list)  # (offset, bytes), by offset
    end: int = 0
    top: int = 0

    def take(self, size: int) -> int:
        size = -(-size // ALIGN) * ALIGN
        for i, (offset, span) in enumerate(self.free):
            if span >= size:
                self.free[i : i + 1] = [(offset + size, span - size)] if span > size else []
                return offset
        if self.free and sum(self.free[-1]) == self.end:  # the last free span grows at the end
            offset, _ = self.free.pop()
        else:
            offset = self.end
        self.end = offset + size
        self.top = max(self.top, self.end)
        return offset

    def give(self, offset: int, size: int) -> None:
        size = -(-size // ALIGN) * ALIGN
        spans = sorted([*self.free, (offset, size)])
        merged: list[tuple[int, int]] = []
        for start, span in spans:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + span)
            else:
                merged.append((start, span))
        self.free = merged


@dataclass(frozen=True)
class Lifetimes:
    """The steps of a program's phases, and which values die with each: the same in every bucket."""

    steps: tuple[tuple[str, Node], ...]
    dying: Mapping[int, tuple[Value, ...]]

    @staticmethod
    def of(phases: Mapping[str, Phase]) -> Lifetimes:
        steps = list(_steps(phases))
        dying: dict[int, list[Value]] = {}
        for value, step in _last_uses(phases, steps).items():
            dying.setdefault(step, []).append(value)
        return Lifetimes(tuple(steps), {step: tuple(values) for step, values in dying.items()})


def plan_memory(
    phases: Mapping[str, Phase], sizes: Sizes, bucket: str, lifetimes: Lifetimes | None = None
) -> tuple[Offsets, int]:
    """Offsets of one bucket, and the arena's bytes. `lifetimes`: of these phases, where many buckets are planned.

    For each phase, for each node in graph order that is no leaf: one offset an output, then one for the workspace of
    its plan. Outputs that replace an input in place are ALIASED.
    """
    known = lifetimes or Lifetimes.of(phases)
    arena, at, offsets = Arena(), dict[Value, int](), dict[str, list[int]]()
    bytes_of = lru_cache(maxsize=None)(lambda type: max(1, type.nbytes(sizes)))  # few types, many values
    for index, (phase, node) in enumerate(known.steps):
        out = offsets.setdefault(phase, [])
        aliased = set((get(node.op).writes or {}).values())
        for value in node.outputs:
            at[value] = ALIASED if value.index in aliased else arena.take(bytes_of(value.type))
            out.append(at[value])
        workspace = phases[phase].plan(node, bucket).workspace
        spot = arena.take(max(1, workspace))
        out.append(spot)
        arena.give(spot, max(1, workspace))
        for value in known.dying.get(index, ()):
            if at[value] != ALIASED:
                arena.give(at[value], bytes_of(value.type))
    return {phase: tuple(o) for phase, o in offsets.items()}, arena.top


def _steps(phases: Mapping[str, Phase]) -> Iterator[tuple[str, Node]]:
    for name, phase in phases.items():
        yield from ((name, node) for node in phase.graph.nodes if not node.is_leaf)


def _last_uses(phases: Mapping[str, Phase], steps: Sequence[tuple[str, Node]]) -> dict[Value, int]:
    """Step index after which each value is dead; results that no later phase reads live to the end."""
    last: dict[Value, int] = {}
    named: dict[str, Value] = {}
    index = 0
    for phase in phases.values():
        inputs = {n[0]: named[n.name] for n in phase.graph.leaves("input") if n.name in named}
        for node in (n for n in phase.graph.nodes if not n.is_leaf):
            for value in (*node.inputs, *node.outputs):
                source = inputs.get(value, value)
                if not source.node.is_leaf:
                    last[source] = index
            index += 1
        named.update(zip(phase.graph.names, phase.graph.outputs, strict=True))
    read_later = {v for p in phases.values() for n in p.graph.leaves("input") if (v := named.get(n.name)) is not None}
    for value in named.values():
        if value in last and value not in read_later:
            last[value] = len(steps)
    return last
