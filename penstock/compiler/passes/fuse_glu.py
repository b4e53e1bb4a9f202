"""One product for the gate and what it gates, with the activation behind it; or for what has no gate."""

from __future__ import annotations

from penstock.compiler.passes.patterns import out_format, siblings, stacked, width
from penstock.ir import Graph, Node, emit
from penstock.ir.rewrite import Match, Rule, Swap


def stack_gate(m: Match) -> Swap | None:
    """glu of two linears of x, read by nothing else: packed_glu of one linear over their stacked weights."""
    if not _gated(m):
        return None
    return {m.node[0]: emit("packed_glu", stacked(_operands(m.node)), act=m.node.attr("act"))[0]}


def halves(m: Match) -> Swap | None:
    """glu of the two halves of a split: packed_glu of what was split."""
    if m.node.op != "glu":
        return None
    gate, up = m.node.inputs
    split = gate.node
    if split.op != "split" or (gate, up) != split.outputs or width(gate) != width(up):
        return None
    return {m.node[0]: emit("packed_glu", split.inputs[0], act=m.node.attr("act"))[0]}


def fuse_glu(m: Match) -> Swap | None:
    """packed_glu of a linear without bias, read by nothing else: linear_glu."""
    if m.node.op != "packed_glu" or (linear := m.node.inputs[0].node).op != "linear":
        return None
    if len(linear.inputs) != 2 or out_format(linear) or not m.only_user(linear[0]):
        return None
    return {m.node[0]: emit("linear_glu", *linear.inputs, act=m.node.attr("act"))[0]}


def fuse_activation(m: Match) -> Swap | None:
    """activate of a linear, read by nothing else: linear_activate."""
    if m.node.op != "activate" or (linear := m.node.inputs[0].node).op != "linear":
        return None
    if out_format(linear) or not m.only_user(linear[0]):
        return None
    return {m.node[0]: emit("linear_activate", *linear.inputs, act=m.node.attr("act"))[0]}


def _gated(m: Match) -> bool:
    return m.node.op == "glu" and siblings(_operands(m.node)) and all(m.only_user(v) for v in m.node.inputs)


def _operands(glu: Node) -> tuple[Node, ...]:
    return tuple(v.node for v in glu.inputs)


def must(graph: Graph) -> int:
    """Twice (stacked, fused) for each glu of two linears of one value; once where they have biases, and for each
    activation of a linear."""
    gates = [n.inputs[0].node for n in graph.nodes if _gated(Match(n, graph))]
    fused = sum(1 if len(gate.inputs) == 3 or out_format(gate) else 2 for gate in gates)
    return fused + sum(fuse_activation(Match(n, graph)) is not None for n in graph.nodes)


RULES: tuple[Rule, ...] = (stack_gate, halves, fuse_glu, fuse_activation)
