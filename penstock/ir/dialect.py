"""Which ops are legal at which stage, and the check at each stage's border."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.errors import GraphError
from penstock.ir.graph import LEAVES, Graph
from penstock.ir.op import get, vocabulary


@dataclass(frozen=True, slots=True)
class Dialect:
    """A named set of ops."""

    name: str
    ops: frozenset[str]


def built() -> Dialect:
    """What a builder may emit: leaves, plain ops and weight ops, nothing fused."""
    return Dialect("built", frozenset(o.name for o in vocabulary() if o.parts is None) | set(LEAVES))


def optimised() -> Dialect:
    """Between passes: fused ops are legal as well."""
    return Dialect("optimised", frozenset(o.name for o in vocabulary()) | set(LEAVES))


def lowered() -> Dialect:
    """What is selected and run: weight expressions have become `weight` leaves, checkpoint tensors are gone."""
    ops = frozenset(o.name for o in vocabulary() if not o.weight)
    return Dialect("lowered", ops | {"input", "state", "weight"})


def verify(graph: Graph, dialect: Dialect) -> Graph:
    """Every node is legal here and types as its op says; state is threaded, never forked. Returns the graph."""
    written: set[object] = set()
    for node in graph.nodes:
        if node.op not in dialect.ops:
            raise GraphError(f"op {node.op!r} is not legal in the {dialect.name} dialect")
        if node.op in LEAVES:
            continue
        spec = get(node.op)
        want = spec.types([v.type for v in node.inputs], dict(node.attrs))
        if want != node.types:
            raise GraphError(f"{node.op} has types {list(map(str, node.types))}, its op gives {list(map(str, want))}")
        for index in spec.writes or ():
            state = node.inputs[index]
            if state in written:
                raise GraphError(f"{node.op} writes a state that an earlier node has already replaced")
            written.add(state)
    return graph
