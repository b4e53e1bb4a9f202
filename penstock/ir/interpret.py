"""Run a graph by its ops' references: the meaning that every pass and every kernel is tested against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock import plugins
from penstock.errors import PluginError
from penstock.formats import stored_as
from penstock.ir.graph import Graph, Node, Type
from penstock.ir.lazy import torch
from penstock.ir.op import get, parts_graph

Feed = Mapping[str, Any]  # leaf name -> torch tensor


def run_node(node: Node, inputs: Sequence[Any], sizes: Mapping[str, int] | None = None) -> tuple[Any, ...]:
    """One node by its reference. The results are born, and so rounded, in the formats their types name."""
    op = get(node.op)
    extra = {"sizes": sizes} if op.sized else {}
    out = op.reference(*inputs, **dict(node.attrs), **extra)
    results = out if isinstance(out, tuple) else (out,)
    if plugins.owner("op", node.op):
        _check_results(node, inputs, results)
    return tuple(born(t, y) for t, y in zip(node.types, results, strict=True))


def _check_results(node: Node, inputs: Sequence[Any], results: Sequence[Any]) -> None:
    """Raises PluginError where an op of a plugin does not give what its type rule says."""
    # A plan's node has no inputs: then only what is a number is compared.
    known = {
        d: n for v, x in zip(node.inputs, inputs, strict=False) for d, n in zip(v.type.shape, x.shape, strict=True)
    }
    got = [tuple(getattr(y, "shape", ("no tensor",))) for y in results]
    want = [tuple(known.get(d, d) if isinstance(d, str) else d for d in t.shape) for t in node.types]
    if len(got) != len(want) or any(map(_differ, got, want)):
        whose = plugins.owner("op", node.op)
        raise PluginError(f"op {node.op!r} of plugin {whose} gives results {got}, by its type rule {want}; mend it")


def _differ(got: tuple[Any, ...], want: tuple[Any, ...]) -> bool:
    return len(got) != len(want) or any(w != g and not isinstance(w, str) for g, w in zip(got, want, strict=True))


def born(type: Type, tensor: Any) -> Any:
    """Round a reference's float32 result to the format of the value it becomes."""
    return tensor.to(getattr(torch, type.format.torch_dtype))


def values(graph: Graph, feed: Feed) -> dict[Node, tuple[Any, ...]]:
    """Every node's results. State tensors in `feed` are updated in place, as a step does."""
    env: dict[Node, tuple[Any, ...]] = {}
    for node in graph.nodes:
        if node.is_leaf:
            env[node] = (feed[node.name],)
        else:
            env[node] = run_node(node, [env[v.node][v.index] for v in node.inputs])
    return env


def interpret(graph: Graph, feed: Feed) -> dict[str, Any]:
    """The graph's named results."""
    env = values(graph, feed)
    return {name: env[v.node][v.index] for name, v in zip(graph.names, graph.outputs, strict=True)}


def run_parts(name: str, tensors: Sequence[Any], attrs: Mapping[str, Any]) -> tuple[Any, ...]:
    """A fused op's reference: the ops it stands for, one after another on the same tensors."""
    types = tuple(type_of(t) for t in tensors)
    graph = parts_graph(name, types, tuple(sorted(attrs.items())))
    out = interpret(graph, {str(i): t for i, t in enumerate(tensors)})
    return tuple(out[name] for name in graph.names)


def type_of(tensor: Any) -> Type:
    """The concrete type of a torch tensor."""
    return Type(tuple(tensor.shape), stored_as(str(tensor.dtype).removeprefix("torch.")))


def bisect(a: Graph, b: Graph, feed: Feed, relative: float) -> Node | None:
    """The first node of `b` whose results no node of `a` reproduces within `relative`; None where all agree.

    Nodes are matched by value, not by name: a pass may rename and reorder as it likes, but what it computes must
    have been computed before. Fused intermediates that `a` never had are skipped when their users agree.
    """
    seen = [y for results in values(a, _clone(feed)).values() for y in results]
    suspect = None
    for node, results in values(b, _clone(feed)).items():
        matched = all(any(close(y, x, relative) for x in seen) for y in results)
        if matched:
            suspect = None
        elif suspect is None:
            suspect = node
    return suspect


def close(y: Any, x: Any, relative: float) -> bool:
    """Same shape, and max|y - x| <= relative * max|x|."""
    if y.shape != x.shape or y.is_floating_point() != x.is_floating_point():
        return False
    difference = (y.double() - x.double()).abs().max() if y.numel() else torch.zeros(())
    return bool(difference <= relative * x.double().abs().max().clamp_min(1e-30)) if y.numel() else True


def _clone(feed: Feed) -> dict[str, Any]:
    return {name: t.clone() for name, t in feed.items()}
