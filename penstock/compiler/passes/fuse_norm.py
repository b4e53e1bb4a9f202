"""The residual's addition and the normalisation that reads it."""

from __future__ import annotations

from penstock.ir import Graph, emit
from penstock.ir.rewrite import Match, Rule, Swap

NORMS = ("rms_norm", "layer_norm")


def fuse_norm(m: Match) -> Swap | None:
    """rms_norm(x + residual): add_rms_norm, whose second result is the sum; layer_norm likewise. Operands keep their
    order."""
    if m.node.op not in NORMS or (total := m.node.inputs[0]).node.op != "add":
        return None
    fused = emit(f"add_{m.node.op}", *total.node.inputs, *m.node.inputs[1:], **dict(m.node.attrs))
    return {m.node[0]: fused[0], total: fused[1]}


def must(graph: Graph) -> int:
    """Once for each sum that a norm reads; a second norm of the same sum stays alone."""
    return len({n.inputs[0] for n in graph.nodes if n.op in NORMS and n.inputs[0].node.op == "add"})


RULES: tuple[Rule, ...] = (fuse_norm,)
