"""Bytes and operations that a token costs: what the roof is computed from."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.engine.profile import Profile
from penstock.ir.graph import Graph, Node


def work_of(graph: Graph, profile: Profile) -> dict[str, float]:
    """Facts of the lowered forward graph.

    weight_bytes: read by every step, whatever its batch (an embedding that only looks rows up is not counted);
    flops_per_token: two for each number of each matrix that a token is multiplied with; flops_per_logit: likewise for
    each row of logits, the head's; kv_bytes_per_token: KV of one position.
    """
    products = [n for n in graph.nodes if n.op.startswith("linear")]
    heads = [n for n in products if "L" in n.types[0].symbols]
    matrices = {n.inputs[1].node.name: n.inputs[1].type for n in products}
    vectors = {
        v.node.name: v.type for n in graph.nodes for v in n.inputs if v.node.op == "weight" and len(v.type.shape) == 1
    }
    kv = sum(n.types[0].nbytes({"N": 1}) for n in graph.leaves("state"))
    return {
        "weight_bytes": float(sum(t.nbytes() for t in (matrices | vectors).values())),
        "flops_per_token": _flops([n for n in products if n not in heads]),
        "flops_per_logit": _flops(heads),
        "kv_bytes_per_token": kv / profile.block_size,
    }


def _flops(products: Sequence[Node]) -> float:
    return float(sum(2 * t.nbytes() // t.format.bytes for t in (n.inputs[1].type for n in products)))
