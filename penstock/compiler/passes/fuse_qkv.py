"""One product for queries, keys and values."""

from __future__ import annotations

from penstock.compiler.passes.patterns import siblings, stacked, width
from penstock.ir import Graph, Node, Value, emit
from penstock.ir.rewrite import Match, Rule, Swap

PREPARED = ("rope", "head_rms_norm", "rms_norm", "head_layer_norm", "layer_norm", "clip")


def fuse_qkv(m: Match) -> Swap | None:
    """attention over three linears of x: one linear over their stacked weights, and a split."""
    if m.node.op != "attention" or not (linears := projections(m.node)):
        return None
    parts = emit("split", stacked(linears), sizes=tuple(width(n[0]) for n in linears)).outputs
    return {n[0]: part for n, part in zip(linears, parts, strict=True)}


def projections(attention: Node) -> tuple[Node, ...] | None:
    """The linears of one value from which an attention's queries, keys and values come; None if they do not."""
    append = attention.inputs[1].node
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
    return len({found for n in graph.nodes if n.op == "attention" and (found := projections(n))})


RULES: tuple[Rule, ...] = (fuse_qkv,)
