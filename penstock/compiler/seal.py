"""Weight expressions that no rule looks into, kept out of the passes' way: of a mixture tens of thousands of nodes."""

from __future__ import annotations

from collections.abc import Mapping

from penstock.ir.graph import Graph, Value, leaf
from penstock.ir.op import get
from penstock.ir.rewrite import substitute

READERS = ("moe",)  # ops that read their weights as the binding makes them, whatever the passes do


def seal(graph: Graph) -> tuple[Graph, Mapping[Value, Value]]:
    """The graph with a `weight` leaf for each weight expression of a reader, and what each leaf stands for."""
    read = (v for node in graph.nodes if node.op in READERS for v in node.inputs)
    hidden = dict.fromkeys(v for v in read if not v.node.is_leaf and get(v.node.op).weight)
    leaves = {v: leaf("weight", f"sealed {i}", v.type) for i, v in enumerate(hidden)}
    return (substitute(graph, leaves) if leaves else graph), {new: old for old, new in leaves.items()}


def unseal(graph: Graph, held: Mapping[Value, Value]) -> Graph:
    """The graph with every leaf that `seal` made replaced by what it stands for."""
    made = {new.node.name: old for new, old in held.items()}
    swaps = {n[0]: made[n.name] for n in graph.leaves("weight") if n.name in made}
    return substitute(graph, swaps) if swaps else graph
