"""Bytes and operations that a token costs: what the roof is computed from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

from penstock.engine.groups import groups_of
from penstock.engine.profile import Profile
from penstock.ir.graph import Graph, Node, Value
from penstock.ir.op import get, parts_graph


def work_of(graph: Graph, profile: Profile) -> dict[str, float]:
    """Facts of the lowered forward graph.

    weight_bytes: read by every step, whatever its batch (an embedding that only looks rows up is not counted);
    flops_per_token: two for each number of each matrix that a token is multiplied with; flops_per_logit: likewise for
    each row of logits, the head's and those of a last layer whose other rows nobody asks for; kv_bytes_per_token: KV of
    one position.
    """
    products = list(_products(graph.nodes))
    heads = [n for n in products if "L" in n.types[0].symbols]
    whole = (v for n in graph.nodes for v in n.inputs if v.node.op == "weight" and v not in _tables(n))
    read = {v.node.name: v.type for v in whole}
    kv = sum(group.unit_bytes for group in groups_of(graph.leaves("state")) if not group.by_slot)
    return {
        "weight_bytes": float(sum(t.nbytes() for t in read.values())),
        "flops_per_token": _flops(products) - _flops(heads),
        "flops_per_logit": _flops(heads),
        "kv_bytes_per_token": kv / profile.block_size,
    }


def _tables(node: Node) -> set[Value]:
    """What a node, or a part of it, looks rows up in as an embedding."""
    if node.op == "embedding":
        return {node.inputs[1]}
    if node.is_leaf or get(node.op).parts is None:
        return set()
    inner = parts_graph(node.op, tuple(v.type for v in node.inputs), node.attrs).nodes
    leaves = (table.node for part in inner for table in _tables(part))
    return {node.inputs[int(leaf.name)] for leaf in leaves if leaf.op == "input"}


def _products(nodes: Iterable[Node]) -> Iterator[Node]:
    """Every product with a matrix, those inside fused ops too."""
    for node in nodes:
        if node.op in ("linear", "head_linear", "moe"):
            yield node
        elif not node.is_leaf and get(node.op).parts is not None:
            yield from _products(parts_graph(node.op, tuple(v.type for v in node.inputs), node.attrs).nodes)


def _flops(products: Iterable[Node]) -> float:
    return sum(2.0 * _multiplied(n) for n in products)


def _multiplied(product: Node) -> float:
    """Numbers of the matrices that a token meets: of a mixture, those of its own experts."""
    types = [v.type for v in product.inputs]
    if product.op != "moe":
        return prod(types[1].concrete({}))
    return int(types[1].shape[-1]) * sum(prod(w.concrete({})[1:]) for w in types[3:5])
