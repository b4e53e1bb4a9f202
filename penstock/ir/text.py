"""A graph as text and as JSON, and back. The text is what people read, golden tests keep and engines store."""

from __future__ import annotations

import json
import re
from typing import Any

from penstock import formats
from penstock.errors import GraphError
from penstock.ir.graph import Dim, Graph, Node, Type, Value, freeze

_LINE = re.compile(r"%(\d+) = (\w+)\(([^)]*)\)(?: (\{.*\}))? : (.+)")
_TYPE = re.compile(r"(\w+)\[([^\]]*)\]")


def print_graph(graph: Graph) -> str:
    """One line a node: `%4 = rms_norm(%3, %1) {"eps": 1e-05} : bf16[T,256]`; last `return name=%9, ...`."""
    ids = {node: i for i, node in enumerate(graph.nodes)}

    def ref(value: Value) -> str:
        return f"%{ids[value.node]}" + (f".{value.index}" if value.index else "")

    lines = []
    for node in graph.nodes:
        attrs = f" {json.dumps(dict(node.attrs))}" if node.attrs else ""
        types = ", ".join(map(str, node.types))
        lines.append(f"%{ids[node]} = {node.op}({', '.join(map(ref, node.inputs))}){attrs} : {types}")
    results = ", ".join(f"{name}={ref(v)}" for name, v in zip(graph.names, graph.outputs, strict=True))
    return "\n".join([*lines, f"return {results}"]) + "\n"


def parse_graph(text: str) -> Graph:
    """The graph that prints as `text`. Raises GraphError with the line that cannot be read."""
    nodes: list[Node] = []
    for line in text.strip().splitlines():
        if line.startswith("return "):
            pairs = [item.split("=") for item in line.removeprefix("return ").split(", ")]
            return Graph(tuple(_ref(nodes, v) for _, v in pairs), tuple(name for name, _ in pairs))
        nodes.append(_parse_node(nodes, line))
    raise GraphError("the graph's text has no 'return' line; it is truncated")


def parse_type(text: str) -> Type:
    """The type printed as `text`."""
    match = _TYPE.fullmatch(text.strip())
    if not match:
        raise GraphError(f"not a type: {text!r}; expected like bf16[T,256]")
    dims = [d for d in match[2].split(",") if d]
    return Type(tuple(_dim(d) for d in dims), formats.parse(match[1]))


def graph_to_json(graph: Graph) -> list[str]:
    """The JSON form is the printed lines: one form to specify, to diff and to hash."""
    return print_graph(graph).splitlines()


def graph_from_json(data: list[str]) -> Graph:
    return parse_graph("\n".join(data))


def _parse_node(nodes: list[Node], line: str) -> Node:
    match = _LINE.fullmatch(line.strip())
    if not match or int(match[1]) != len(nodes):
        raise GraphError(f"cannot read graph line {len(nodes)}: {line!r}")
    inputs = tuple(_ref(nodes, item) for item in match[3].split(", ") if item)
    attrs: dict[str, Any] = json.loads(match[4]) if match[4] else {}
    types = tuple(parse_type(t) for t in re.findall(r"\w+\[[^\]]*\]", match[5]))
    return Node(match[2], inputs, tuple(sorted((k, freeze(v)) for k, v in attrs.items())), types)


def _ref(nodes: list[Node], text: str) -> Value:
    number, _, index = text.strip().removeprefix("%").partition(".")
    return Value(nodes[int(number)], int(index or 0))


def _dim(text: str) -> Dim:
    return int(text) if text.lstrip("-").isdigit() else text
