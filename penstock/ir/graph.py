"""A tensor program as an immutable graph of typed values. No torch, no GPU.

A Graph is a value: passes take one and return another. It prints as text that parses back to the same graph, has a
JSON form and a hash. Shapes hold ints and the names of run-time sizes ("T" tokens, "S" sequences, "L" logit rows).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from penstock import formats
from penstock.formats import Format

Dim = int | str
Attr = int | float | str | bool | tuple[Any, ...]

LEAVES = ("input", "state", "tensor", "weight")
_SEQUENCE = (list, tuple)


@dataclass(frozen=True, slots=True)
class Type:
    """A shape and a number format. Printed as `bf16[T,4096]`."""

    shape: tuple[Dim, ...]
    format: Format

    def __str__(self) -> str:
        return f"{self.format}[{','.join(map(str, self.shape))}]"

    @property
    def symbols(self) -> frozenset[str]:
        """The run-time sizes in the shape."""
        return frozenset(d for d in self.shape if isinstance(d, str))

    def concrete(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every symbol replaced."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.shape)

    def nbytes(self, sizes: Mapping[str, int] | None = None) -> int:
        """Bytes of the dense tensor, its symbols taken from `sizes`."""
        count = 1
        for d in self.concrete(sizes or {}):
            count *= d
        return count * self.format.bytes


def tensor(format: str | Format, *shape: Dim) -> Type:
    """Shorthand: `tensor("bf16", "T", 4096)`."""
    return Type(tuple(shape), formats.parse(format) if isinstance(format, str) else format)


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """One application of an op. Compared by identity: two equal computations are merged only by the `share` pass."""

    op: str
    inputs: tuple[Value, ...]
    attrs: tuple[tuple[str, Attr], ...]  # sorted by name
    types: tuple[Type, ...]

    def __getitem__(self, index: int) -> Value:
        return Value(self, index)

    @property
    def outputs(self) -> tuple[Value, ...]:
        return tuple(Value(self, i) for i in range(len(self.types)))

    def attr(self, name: str) -> Any:
        return dict(self.attrs)[name]

    @property
    def name(self) -> str:
        """The name of a leaf."""
        return str(self.attr("name"))

    @property
    def is_leaf(self) -> bool:
        return self.op in LEAVES


@dataclass(frozen=True, slots=True)
class Value:
    """One result of a node."""

    node: Node
    index: int = 0

    @property
    def type(self) -> Type:
        return self.node.types[self.index]


def freeze(attr: Any) -> Attr:
    """Lists become tuples, so that attributes hash and a JSON round trip is exact."""
    return tuple([freeze(a) for a in attr]) if isinstance(attr, _SEQUENCE) else attr


def leaf(kind: str, name: str, type: Type, **attrs: Any) -> Value:
    """An input, a state, or a tensor of the checkpoint, known by name."""
    assert kind in LEAVES, kind
    frozen = tuple(sorted((k, freeze(v)) for k, v in {"name": name, **attrs}.items())) if attrs else (("name", name),)
    return Node(kind, (), frozen, (type,))[0]


@dataclass(frozen=True)
class Graph:
    """Named results. Everything they need is reachable from them; nothing else exists."""

    outputs: tuple[Value, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.outputs) == len(self.names), "every output has a name"

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Every node, producers first, in a fixed order."""
        return tuple(_topological(v.node for v in self.outputs))

    @cached_property
    def results(self) -> frozenset[Value]:
        """The outputs as a set: a value in it is read from outside."""
        return frozenset(self.outputs)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    @cached_property
    def users(self) -> Mapping[Value, tuple[Node, ...]]:
        """Who reads each value, in graph order (a node that reads it twice is named twice)."""
        users: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                users.setdefault(value, []).append(node)
        return {value: tuple(nodes) for value, nodes in users.items()}

    def leaves(self, kind: str) -> tuple[Node, ...]:
        return tuple(n for n in self.nodes if n.op == kind)

    def key(self) -> str:
        """A hash of the printed graph: equal for structurally equal graphs."""
        from penstock.ir.text import print_graph

        return hashlib.sha256(print_graph(self).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        from penstock.ir.text import print_graph

        return print_graph(self)


def _topological(roots: Iterable[Node]) -> Iterator[Node]:
    seen: set[Node] = set()
    stack = [(node, False) for node in reversed(list(roots))]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            if not node.inputs:
                yield node
                continue
            stack.append((node, True))
            stack.extend((v.node, False) for v in reversed(node.inputs))
