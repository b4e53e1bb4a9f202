"""Pad odd sizes to what tensor cores want, invisibly to the outside.

A product's rows are padded with zeros and its extra columns cut off again by `narrow`; where the next product can
take the extra columns instead, because they are known to be zero, its weight gets zero columns and no cut is left.
"""

from __future__ import annotations

from penstock.compiler.passes.patterns import concat, out_format, padded, width
from penstock.ir import Graph, Node, Value, emit
from penstock.ir.rewrite import Match, Rule, Swap
from penstock.models.storage import rows

PLAIN = ("linear", "linear_activate")
POINTWISE = ("activate", "clip", "scale", "softcap")  # those that make zero of zero
MULTIPLE = 8  # 16 bytes of a 16-bit format: the alignment that tensor-core loads and vector loads ask for


def aligned(size: int) -> int:
    """The next multiple."""
    return -(-size // MULTIPLE) * MULTIPLE


def pad_linear(m: Match) -> Swap | None:
    """A product of odd width: zero rows behind the weight and bias, and a narrow."""
    if not _odd_linear(m.graph, m.node):
        return None
    size = width(m.node[0])
    operands = (padded(w, aligned(size)) for w in m.node.inputs[1:])
    wide = emit(m.node.op, m.node.inputs[0], *operands, **dict(m.node.attrs))[0]
    return {m.node[0]: _cut(wide, size)}


def pad_packed_glu(m: Match) -> Swap | None:
    """packed_glu of a linear, odd in each half: zero rows behind both halves, and a narrow."""
    if m.node.op != "packed_glu" or not _odd(m.node) or (linear := m.node.inputs[0].node).op != "linear":
        return None
    size = width(m.node[0])
    operands = (_padded_halves(w, size) for w in linear.inputs[1:])
    wide = emit("linear", linear.inputs[0], *operands, out=out_format(linear))[0]
    return {m.node[0]: _cut(emit("packed_glu", wide, act=m.node.attr("act"))[0], size)}


def pad_linear_glu(m: Match) -> Swap | None:
    """linear_glu of odd width: zero rows behind both halves of its weight, and a narrow."""
    if m.node.op != "linear_glu" or not _odd(m.node):
        return None
    x, w = m.node.inputs
    size = width(m.node[0])
    return {m.node[0]: _cut(emit("linear_glu", x, _padded_halves(w, size), act=m.node.attr("act"))[0], size)}


def narrow_after_glu(m: Match) -> Swap | None:
    """glu of two values that are cut alike: cut the result instead."""
    if m.node.op != "glu" or any(v.node.op != "narrow" for v in m.node.inputs):
        return None
    gate, up = (v.node.inputs[0] for v in m.node.inputs)
    if gate.type != up.type:
        return None
    return {m.node[0]: _cut(emit("glu", gate, up, act=m.node.attr("act"))[0], width(m.node[0]))}


def narrow_after_pointwise(m: Match) -> Swap | None:
    """An op element by element on a value that is cut: cut the result, perhaps the next product takes it uncut."""
    if m.node.op not in POINTWISE or (cut := m.node.inputs[0].node).op != "narrow":
        return None
    return {m.node[0]: _cut(emit(m.node.op, cut.inputs[0], **dict(m.node.attrs))[0], width(m.node[0]))}


def narrow_into_linear(m: Match) -> Swap | None:
    """A product over a value whose cut columns are zero: zero columns in the weight, no cut."""
    if m.node.op not in PLAIN or (cut := m.node.inputs[0].node).op != "narrow":
        return None
    wide = cut.inputs[0]
    if not _zero_behind(wide, width(cut[0])):
        return None
    weight = padded(m.node.inputs[1], width(wide), dim=1)
    return {m.node[0]: emit(m.node.op, wide, weight, *m.node.inputs[2:], **dict(m.node.attrs))[0]}


def padded_table(m: Match) -> Swap | None:
    """An embedding whose table is also a padded head: it reads the padded one, and the engine stores one."""
    if m.node.op != "embedding":
        return None
    tokens, table = m.node.inputs
    taller = [n[0] for n in m.users(table) if n.op == "pad" and n.attr("dim") == 0]
    return {m.node[0]: emit("embedding", tokens, taller[0])[0]} if taller else None


def _odd(node: Node) -> bool:
    return width(node[0]) % MULTIPLE != 0


def _odd_linear(graph: Graph, node: Node) -> bool:
    """Halves of a packed_glu are padded each by itself, by another rule."""
    return node.op in PLAIN and _odd(node) and all(u.op != "packed_glu" for u in graph.users.get(node[0], ()))


def _cut(wide: Value, size: int) -> Value:
    return emit("narrow", wide, size=size)[0]


def _padded_halves(w: Value, size: int) -> Value:
    return concat(padded(rows(w, at, at + size), aligned(size)) for at in (0, size))


def _zero_behind(value: Value, size: int) -> bool:
    """Whether columns from `size` on are zero: products of zero rows, and what makes zeros of such (act(0) = 0)."""
    node = value.node
    match node.op:
        case "linear" | "linear_activate":
            return all(_zero_rows(w, size) for w in node.inputs[1:])
        case "activate" | "clip" | "scale" | "softcap":
            return _zero_behind(node.inputs[0], size)
        case "glu":
            return any(_zero_behind(v, size) for v in node.inputs)
        case "linear_glu":
            return _zero_halves(node.inputs[1], size)
        case "packed_glu":
            linear = node.inputs[0].node
            return linear.op == "linear" and all(_zero_halves(w, size) for w in linear.inputs[1:])
    return False


def _zero_rows(w: Value, size: int) -> bool:
    return w.node.op == "pad" and w.node.attr("dim") == 0 and int(w.node.inputs[0].type.shape[0]) <= size


def _zero_halves(w: Value, size: int) -> bool:
    return w.node.op == "concat" and len(w.node.inputs) == 2 and all(_zero_rows(half, size) for half in w.node.inputs)


def must(graph: Graph) -> int:
    """Once for each product of odd width."""
    return sum(_odd_linear(graph, n) or (n.op == "linear_glu" and _odd(n)) for n in graph.nodes)


RULES: tuple[Rule, ...] = (
    pad_packed_glu,
    pad_linear_glu,
    pad_linear,
    narrow_after_glu,
    narrow_after_pointwise,
    narrow_into_linear,
    padded_table,
)
