"""Rotation, append and attention in one op: a step of few tokens then needs no launch between the products."""

from __future__ import annotations

from penstock.compiler.passes.patterns import option
from penstock.ir import Graph, Node, emit
from penstock.ir.rewrite import Match, Rule, Swap


def fuse_attention(m: Match) -> Swap | None:
    """attention over what a rope_append made, queries and cache: rope_attention. Its results are y and the cache."""
    if not (first := _appended(m)):
        return None
    spans, extras = m.node.inputs[2:5], m.node.inputs[6:]
    attrs = {"heads": m.node.attr("heads"), "scale": m.node.attr("scale"), "factor": option(first, "scale", 1.0)}
    attrs |= {k: v for k, v in m.node.attrs if k in ("window", "softcap", "extras")}
    attrs |= {k: v for k, v in first.attrs if k in ("interleaved", "eps", "offset")}
    fused = emit("rope_attention", *first.inputs[:6], *spans, *first.inputs[6:], *extras, **attrs)
    return {m.node[0]: fused[0], first[1]: fused[1]}


def _appended(m: Match) -> Node | None:
    """The rope_append whose queries only this attention reads, over the cache that it left and by the same table."""
    if m.node.op != "attention" or (first := m.node.inputs[0].node).op != "rope_append":
        return None
    q, kv, _, _, _, table = m.node.inputs[:6]
    same = (q, kv, table) == (first[0], first[1], first.inputs[5]) and m.node.attr("heads") == first.attr("heads")
    return first if same and m.only_user(q) is m.node else None


def must(graph: Graph) -> int:
    """Once for each attention whose queries and cache come from one rope_append, and go nowhere else."""
    return sum(n.op == "attention" and _appended(Match(n, graph)) is not None for n in graph.nodes)


RULES: tuple[Rule, ...] = (fuse_attention,)
