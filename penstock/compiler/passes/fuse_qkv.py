"""One product for queries, keys and values, or for what an encoder keeps of them."""

from __future__ import annotations

from penstock.compiler.passes.patterns import siblings, stacked, width
from penstock.ir import Graph, Node, Value, emit
from penstock.ir.rewrite import Match, Rule, Swap

ATTENTION = ("attention", "encoder_attention", "prefix_attention")
PREPARED = ("rope", "prefix_rope", "head_rms_norm", "rms_norm", "head_layer_norm", "layer_norm", "clip")


def fuse_qkv(m: Match) -> Swap | None:
    """attention over three linears of x: one linear over their stacked weights, and a split."""
    linears = projections(m.node) if m.node.op in ATTENTION else None
    return _together(linears) if linears else None


def fuse_kv(m: Match) -> Swap | None:
    """The same of keys and values that an encoder leaves for others to look at."""
    return _together(pair) if (pair := kept(m.graph, m.node)) else None


def kept(graph: Graph, node: Node) -> tuple[Node, ...] | None:
    """The linears of one value that a kv_append stores which nothing here reads; None where they are no such."""
    if node.op != "kv_append" or graph.users.get(node[0]):
        return None
    found = tuple(origin(v).node for v in node.inputs[1:3])
    return found if siblings(found) else None


def _together(linears: tuple[Node, ...]) -> Swap:
    parts = emit("split", stacked(linears), sizes=tuple(width(n[0]) for n in linears)).outputs
    return {n[0]: part for n, part in zip(linears, parts, strict=True)}


def projections(attention: Node) -> tuple[Node, ...] | None:
    """The linears of one value from which an attention's queries, keys and values come; None if they do not."""
    append = attention.inputs[1].node
    if attention.op == "encoder_attention":
        found = tuple(v.node for v in attention.inputs[:3])
        return found if siblings(found) else None
    if append.op != "kv_append":
        return None
    found = tuple(origin(v).node for v in (attention.inputs[0], *append.inputs[1:3]))
    return found if siblings(found) else None


def origin(value: Value) -> Value:
    """The value before it was clipped, normalised and rotated."""
    while value.node.op in PREPARED:
        value = value.node.inputs[0]
    return value


def must(graph: Graph) -> int:
    """Once for each attention whose queries, keys and values are three linears of one value."""
    whole = {found for n in graph.nodes if n.op in ATTENTION and (found := projections(n))}
    return len(whole | {found for n in graph.nodes if (found := kept(graph, n))})


RULES: tuple[Rule, ...] = (fuse_qkv, fuse_kv)
