"""Merge identical sub-expressions."""

from __future__ import annotations

from collections.abc import Hashable

from penstock.ir import Graph, Node, Value
from penstock.ir.op import get
from penstock.ir.rewrite import Rewritten


def share(graph: Graph) -> Rewritten:
    """One node for each distinct computation: value numbering in one sweep, producers first.

    A node that writes state stands for itself alone. Leaves of one kind and name are one thing, state included.
    """
    kept: dict[Hashable, Node] = {}
    memo: dict[Node, Node] = {}
    for node in graph.nodes:
        inputs = tuple([v if (new := memo[v.node]) is v.node else Value(new, v.index) for v in node.inputs])
        new = node if inputs == node.inputs else Node(node.op, inputs, node.attrs, node.types)
        memo[node] = kept.setdefault(_key(new), new)
    outputs = tuple(Value(memo[v.node], v.index) for v in graph.outputs)
    return Rewritten(Graph(outputs, graph.names), {"share": len(memo) - len(kept)})


def _key(node: Node) -> Hashable:
    if node.is_leaf:
        return node.op, node.attrs, node.types
    if get(node.op).writes:
        return node
    return node.op, node.inputs, repr(node.attrs), node.types  # repr: 0.0 and -0.0 are equal, and not the same
