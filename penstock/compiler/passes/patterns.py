"""What the rules of several passes ask and build."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.ir import Node, Value, emit


def option(node: Node, name: str, default: float) -> float:
    """A numeric attribute that may have been left out."""
    return float(dict(node.attrs).get(name, default))  # type: ignore[arg-type]


def width(value: Value) -> int:
    """The last dimension, which is never symbolic where a rule looks."""
    last = value.type.shape[-1]
    assert isinstance(last, int), value.type
    return last


def out_format(linear: Node) -> str | None:
    """The `out` with which `linear` has to be emitted again; None where it is x's own format."""
    result = linear.types[0].format
    return None if result == linear.inputs[0].type.format else result.name


def siblings(nodes: Sequence[Node | None]) -> bool:
    """Different linears of one value, alike in formats and all with a bias or all without: one product can do them."""
    if any(n is None or n.op != "linear" for n in nodes) or len(set(nodes)) != len(nodes):
        return False
    kinds = {(n.inputs[0], n.types[0].format, tuple(v.type.format for v in n.inputs)) for n in nodes if n}
    return len(kinds) == 1


def stacked(linears: Sequence[Node]) -> Value:
    """The one linear whose columns are those of all the siblings, in order."""
    operands = zip(*(n.inputs[1:] for n in linears), strict=True)  # all weights, then all biases
    rows = (concat(parts) for parts in operands)
    return emit("linear", linears[0].inputs[0], *rows, out=out_format(linears[0]))[0]


def concat(parts: Iterable[Value], dim: int = 0) -> Value:
    return emit("concat", *parts, dim=dim)[0]


def padded(x: Value, size: int, dim: int = 0) -> Value:
    """A weight with zeros behind it along `dim`."""
    return emit("pad", x, dim=dim, size=size)[0]
