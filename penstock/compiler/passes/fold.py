"""Fold away what computes nothing: weight expressions that cancel, and operations that return their operand.

Nothing here removes a `narrow` or a `pad` that changes a size, so that `align` may stand before it.
"""

from __future__ import annotations

from itertools import pairwise

from penstock.compiler.passes.patterns import concat, option, out_format, width
from penstock.ir import Node, Value, emit
from penstock.ir.rewrite import Match, Rule, Swap
from penstock.models.storage import rows


def identity(m: Match) -> Swap | None:
    """An operation that changes nothing is its operand."""
    node = m.node
    same_type = len(node.inputs) == 1 and node.types == (node.inputs[0].type,)
    if not same_type or not _changes_nothing(node):
        return None
    return {node[0]: node.inputs[0]}


def _changes_nothing(node: Node) -> bool:
    match node.op:
        case "slice" | "concat" | "pad" | "reshape" | "narrow" | "split":
            return True  # one operand, and all of it: they only choose and arrange
        case "scale":
            return option(node, "factor", 1.0) == 1.0
        case "shift":
            return option(node, "value", 0.0) == 0.0
    return False


def repeated(m: Match) -> Swap | None:
    """narrow of narrow, reshape of reshape, pad of pad along one dimension: the last alone."""
    node = m.node
    if node.op not in ("narrow", "reshape", "pad") or (inner := node.inputs[0].node).op != node.op:
        return None
    if node.op == "pad" and node.attr("dim") != inner.attr("dim"):
        return None
    return {node[0]: emit(node.op, inner.inputs[0], **dict(node.attrs))[0]}


def transpose_twice(m: Match) -> Swap | None:
    if m.node.op != "transpose" or (inner := m.node.inputs[0].node).op != "transpose":
        return None
    return {m.node[0]: inner.inputs[0]}


def flat_concat(m: Match) -> Swap | None:
    """concat(concat(a, b), c) = concat(a, b, c)."""
    if m.node.op != "concat":
        return None
    dim = m.node.attr("dim")
    nested = [v.node.op == "concat" and v.node.attr("dim") == dim for v in m.node.inputs]
    if not any(nested):
        return None
    parts = (p for v, deep in zip(m.node.inputs, nested, strict=True) for p in (v.node.inputs if deep else (v,)))
    return {m.node[0]: concat(parts, dim)}


def joined_slices(m: Match) -> Swap | None:
    """concat(x[0:2], x[2:5], y) = concat(x[0:5], y): a checkpoint that is fused already stays as it is."""
    if m.node.op != "concat":
        return None
    dim = m.node.attr("dim")
    for i, (a, b) in enumerate(pairwise(m.node.inputs)):
        if joined := _joined(a.node, b.node, dim):
            return {m.node[0]: concat((*m.node.inputs[:i], joined, *m.node.inputs[i + 2 :]), dim)}
    return None


def _joined(a: Node, b: Node, dim: int) -> Value | None:
    if a.op != "slice" or b.op != "slice" or a.inputs != b.inputs or not a.attr("dim") == b.attr("dim") == dim:
        return None
    return rows(a.inputs[0], a.attr("start"), b.attr("stop"), dim) if a.attr("stop") == b.attr("start") else None


def nested_slice(m: Match) -> Swap | None:
    """A slice of a slice, of a pad's own part, or within one part of a concat: a slice of what lies below."""
    node = m.node
    if node.op != "slice" or (below := node.inputs[0].node).op not in ("slice", "pad", "concat"):
        return None
    dim, start, stop = node.attr("dim"), node.attr("start"), node.attr("stop")
    if below.attr("dim") != dim:
        return None
    if below.op == "slice":
        return {node[0]: rows(below.inputs[0], below.attr("start") + start, below.attr("start") + stop, dim)}
    at = 0
    for part in below.inputs:  # a pad is a concat whose last part, the zeros, is not written down
        size = int(part.type.shape[dim])
        if at <= start and stop <= at + size:
            return {node[0]: rows(part, start - at, stop - at, dim)}
        at += size
    return None


def unused_columns(m: Match) -> Swap | None:
    """A split product of which one part is read: the product with those rows of the weight alone."""
    node = m.node
    if node.op != "split" or (linear := node.inputs[0].node).op != "linear" or not m.only_user(linear[0]):
        return None
    used = [v for v in node.outputs if m.users(v) or v in m.graph.results]
    if len(used) != 1 or len(node.outputs) == 1:
        return None
    start = sum(width(v) for v in node.outputs[: used[0].index])
    operands = (rows(w, start, start + width(used[0])) for w in linear.inputs[1:])
    return {used[0]: emit("linear", linear.inputs[0], *operands, out=out_format(linear))[0]}


RULES: tuple[Rule, ...] = (
    identity,
    repeated,
    transpose_twice,
    flat_concat,
    joined_slices,
    nested_slice,
    unused_columns,
)
