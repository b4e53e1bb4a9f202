"""Cut the weights out of a graph: what is left is what a step runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from penstock.compiler.passes.share import share
from penstock.errors import GraphError
from penstock.ir.dialect import lowered, verify
from penstock.ir.graph import Graph, Node, Value, leaf
from penstock.ir.op import get
from penstock.ir.rewrite import substitute

SHOWN = 4  # parts of a fused weight that its name spells out


@dataclass(frozen=True, slots=True)
class Lowered:
    """A graph over `weight` leaves, and for each leaf's name the expression that makes it.

    An expression has one result, "weight", and reads `tensor` leaves of the checkpoint only.
    """

    graph: Graph
    weights: Mapping[str, Graph]
    others: tuple[Graph, ...] = ()


def lower(first: Graph, *others: Graph) -> Lowered:
    """Replace each maximal weight expression that something else reads by a `weight` leaf. Of several graphs, whose
    results have different names, the weights are those of all.

    Equal expressions become one weight. Raises GraphError where a weight op reads a value of the step.
    """
    graph = share(_joined((first, *others))).graph
    made = _made_at_build(graph)
    roots = _roots(graph, made)
    names = _unique(_stem(v) for v in roots)
    swaps = {v: leaf("weight", name, v.type) for name, v in zip(names, roots, strict=True)}
    weights = {name: Graph((v,), ("weight",)) for name, v in zip(names, roots, strict=True)}
    parts = _parted(substitute(graph, swaps), (first, *others))
    return Lowered(verify(parts[0], lowered()), weights, tuple(verify(part, lowered()) for part in parts[1:]))


def _joined(graphs: Sequence[Graph]) -> Graph:
    return Graph(tuple(v for g in graphs for v in g.outputs), tuple(n for g in graphs for n in g.names))


def _parted(graph: Graph, like: Sequence[Graph]) -> list[Graph]:
    """The inverse."""
    ends = [*accumulate(len(each.names) for each in like)]
    spans = [slice(end - len(each.names), end) for each, end in zip(like, ends, strict=True)]
    return [Graph(graph.outputs[span], graph.names[span]) for span in spans]


def _made_at_build(graph: Graph) -> set[Node]:
    """Checkpoint tensors, and the weight ops over them."""
    made: set[Node] = set()
    for node in graph.nodes:
        if node.op == "tensor":
            made.add(node)
        elif not node.is_leaf and get(node.op).weight:
            if foreign := [v.node.op for v in node.inputs if v.node not in made]:
                raise GraphError(f"weight op {node.op!r} reads a result of {foreign[0]!r}, which only a step computes")
            made.add(node)
    return made


def _roots(graph: Graph, made: set[Node]) -> list[Value]:
    """The weights that a step reads, in graph order, each once."""
    read = [v for node in graph.nodes if node not in made for v in node.inputs]
    return list(dict.fromkeys(v for v in (*read, *graph.outputs) if v.node in made))


def _stem(value: Value) -> str:
    """A name from the checkpoint tensors below: `layers.0.q+k+v.weight`; from the op where there are none."""
    names = [n.name for n in Graph((value,), ("weight",)).leaves("tensor")]
    return _common(names) if names else f"{value.node.op}.0"


def _common(names: Sequence[str]) -> str:
    """One name with the parts that differ side by side, split at dots."""
    parts = [name.split(".") for name in names]
    head = _shared(parts)
    rest = [p[head:] for p in parts]
    tail = _shared([r[::-1] for r in rest])
    middles = list(dict.fromkeys(".".join(r[: len(r) - tail]) for r in rest))
    if len(middles) > SHOWN:
        middles = [middles[0], "...", middles[-1]]
    middle = "+".join(filter(None, middles))
    return ".".join((*parts[0][:head], *filter(None, (middle,)), *rest[0][len(rest[0]) - tail :]))


def _shared(lists: Sequence[Sequence[str]]) -> int:
    """How many items all the lists have in common at their beginning."""
    columns = enumerate(zip(*lists, strict=False))
    return next((i for i, column in columns if len(set(column)) > 1), min(map(len, lists)))


def _unique(stems: Iterable[str]) -> list[str]:
    """Stems in order, a taken one with the next free number behind it."""
    taken: dict[str, None] = {}
    next_free: dict[str, int] = {}
    for stem in stems:
        name = stem
        while name in taken:
            next_free[stem] = next_free.get(stem, 0) + 1
            name = f"{stem.removesuffix('.0')}.{next_free[stem]}"
        taken[name] = None
    return list(taken)
