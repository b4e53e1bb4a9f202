"""Picking rows before the work instead of after it: what a step's other rows would have computed is not computed."""

from __future__ import annotations

from penstock.ir import Graph, Value, emit
from penstock.ir.rewrite import Match, Rule, Swap

# Ops that treat each row alone, and which of their inputs hold rows; the others are weights.
ROWWISE = {"add": (0, 1), "glu": (0, 1)} | dict.fromkeys(
    ("activate", "clip", "layer_norm", "linear", "rms_norm", "scale", "softcap"), (0,)
)


def sink_rows(m: Match) -> Swap | None:
    """A row-wise op read only by take_rows of the same rows: the op on rows picked from its inputs."""
    if (rows := _picked(m)) is None:
        return None
    places = ROWWISE[m.node.op]
    inputs = [emit("take_rows", v, rows)[0] if i in places else v for i, v in enumerate(m.node.inputs)]
    new = emit(m.node.op, *inputs, **dict(m.node.attrs))[0]
    return {user[0]: new for user in m.users(m.node[0])}


def _picked(m: Match) -> Value | None:
    """The rows that every reader of the node picks from it."""
    if m.node.op not in ROWWISE or (value := m.node[0]) in m.graph.results:
        return None
    rows = {n.inputs[1] if n.op == "take_rows" and n.inputs[0] == value else None for n in m.users(value)}
    return rows.pop() if len(rows) == 1 else None


def must(graph: Graph) -> int:
    """At least once for each op that is only picked from."""
    return sum(_picked(Match(node, graph)) is not None for node in graph.nodes)


RULES: tuple[Rule, ...] = (sink_rows,)
