"""From one product to the next across the residual stream: what stands between them needs no launch of its own."""

from __future__ import annotations

from penstock.compiler.passes.patterns import out_format
from penstock.ir import Graph, Node, emit
from penstock.ir.rewrite import Match, Rule, Swap


def fuse_block(m: Match) -> Swap | None:
    """linear, add_rms_norm, then linear or linear_glu, with nothing else reading what lies between."""
    if (normal := _normal(m)) is None or (inner := _inner(m, normal)) is None:
        return None
    residual = next(v for v in normal.inputs[:2] if v != inner[0])
    options = dict(normal.attrs) | {k: v for k, v in m.node.attrs if k == "act"}
    fused = emit("linear_norm_linear", *inner.inputs, residual, normal.inputs[2], *m.node.inputs[1:], **options)
    return {m.node[0]: fused[0], normal[1]: fused[1]}


def _normal(m: Match) -> Node | None:
    """The add_rms_norm whose norm this product alone reads."""
    if m.node.op not in ("linear", "linear_glu") or out_format(m.node):
        return None  # a finer result would show how what lies between was rounded
    value = m.node.inputs[0]
    is_norm = value.node.op == "add_rms_norm" and value == value.node[0]
    return value.node if is_norm and m.only_user(value) else None


def _inner(m: Match, normal: Node) -> Node | None:
    """The product without a bias that the sum adds, and nothing else reads."""
    for value in normal.inputs[:2]:
        node = value.node
        if node.op == "linear" and len(node.inputs) == 2 and not out_format(node) and m.only_user(value):
            return node
    return None


def must(graph: Graph) -> int:
    """Once for each pair of products with only a residual sum and its norm between them."""
    return sum(fuse_block(Match(node, graph)) is not None for node in graph.nodes)


RULES: tuple[Rule, ...] = (fuse_block,)


def join_blocks(m: Match) -> Swap | None:
    """A gated linear_norm_linear and the one that alone reads what it leaves, with norms alike."""
    second, own = m.node, dict(m.node.attrs)
    if second.op != "linear_norm_linear" or "act" in own:
        return None
    first = second.inputs[0].node
    if first.op != second.op or second.inputs[::2][:2] != first.outputs or not all(map(m.only_user, first.outputs)):
        return None
    options = dict(first.attrs)
    if "act" not in options or options != own | {"act": options["act"]}:
        return None
    joined = emit("dense_block", *first.inputs, second.inputs[1], *second.inputs[3:], **options)
    return {second[0]: joined[0], second[1]: joined[1]}


def must_join(graph: Graph) -> int:
    """Once for each pair of which the second reads the first."""
    return sum(join_blocks(Match(node, graph)) is not None for node in graph.nodes)


JOINS: tuple[Rule, ...] = (join_blocks,)
