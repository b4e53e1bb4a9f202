"""The list of passes: counted, verified after each, strict about what must fire, and fast."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given

from penstock.compiler import pipeline
from penstock.compiler.lower import lower
from penstock.compiler.pipeline import PASSES, Pass
from penstock.errors import GraphError, PassError
from penstock.ir import Graph, Node, emit
from penstock.ir.rewrite import Match, Rewritten, Swap, rewrite
from penstock.ir.text import parse_graph, print_graph
from penstock.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, Rope
from tests.golden.specs import FAMILIES, ODD, forward
from tests.null.passes.graphs import graph, graphs, value


@pytest.mark.parametrize("name", ["fuse_qkv", "fuse_glu", "fuse_norm", "fuse_rope", "align"])
def test_a_pass_that_must_fire_and_does_not_is_named(name: str) -> None:
    lame = [replace(p, body=()) if p.name == name else p for p in PASSES]
    with pytest.raises(PassError, match=f"pass '{name}' must fire"):
        pipeline.run(forward(ODD["odd F"]), lame)


def test_firing_less_often_than_it_must_is_an_error_too() -> None:
    qkv = next(each for each in PASSES if each.name == "fuse_qkv")
    once = replace(qkv, body=lambda graph: Rewritten(graph, {"fuse_qkv": 1}))
    with pytest.raises(PassError, match="must fire 2 times on this graph and fired 1"):
        pipeline.run(forward(FAMILIES["llama"]), [once])


def test_what_a_pass_breaks_is_found_behind_it() -> None:
    def retype(graph: Graph) -> Rewritten:
        node = graph.outputs[0].node
        wrong = Node(node.op, node.inputs, (), node.types)  # loses out="f32"
        return Rewritten(Graph((wrong[0], *graph.outputs[1:]), graph.names), {})

    with pytest.raises(GraphError, match="linear has types"):
        pipeline.run(forward(FAMILIES["llama"]), [Pass("retype", retype)])


def test_rules_that_never_rest_are_an_error() -> None:
    def again(m: Match) -> Swap | None:
        return {m.node[0]: emit("add", *m.node.inputs)[0]} if m.node.op == "add" else None

    with pytest.raises(PassError, match="'again': 1000"):
        rewrite(graph(emit("add", value("x", 8), value("y", 8))[0]), [again])


def test_a_fused_graph_is_no_builders() -> None:
    fused, _ = pipeline.run(forward(FAMILIES["llama"]))
    with pytest.raises(GraphError, match="not legal in the built dialect"):
        pipeline.run(fused)


def test_results_record_every_pass() -> None:
    built = forward(FAMILIES["llama"])
    fused, results = pipeline.run(built)
    assert [r.name for r in results] == [p.name for p in PASSES]
    assert len({p.name for p in PASSES}) == len(PASSES)
    assert results[0].nodes_before == len(built.nodes) and results[-1].graph is fused
    for before, after in pairwise(results):
        assert before.nodes_after == after.nodes_before == len(before.graph.nodes)


@pytest.mark.parametrize("name", [*FAMILIES, *ODD])
def test_the_pipeline_is_idempotent(name: str) -> None:
    fused, _ = pipeline.run(forward((FAMILIES | ODD)[name]))
    for step in PASSES:
        assert str(step(fused).graph) == str(fused), step.name


@given(graphs())
def test_random_graphs_print_and_parse(built: Graph) -> None:
    for g in (built, pipeline.run(built)[0], lower(pipeline.run(built)[0]).graph):
        assert print_graph(parse_graph(print_graph(g))) == print_graph(g)
        assert parse_graph(print_graph(g)).key() == g.key()


@given(graphs())
def test_random_graphs_keep_their_results_types(built: Graph) -> None:
    fused, _ = pipeline.run(built)
    assert fused.names == built.names
    assert [v.type for v in fused.outputs] == [v.type for v in built.outputs]


def seconds(spec: ModelSpec) -> float:
    """CPU time, which neighbours on the machine do not lengthen."""
    start = time.process_time()
    lower(pipeline.run(forward(spec))[0])
    return time.process_time() - start


def test_eighty_layers_pass_in_well_under_a_second() -> None:
    layer = LayerSpec(Attention(64, 8, 128, 128**-0.5, Rope(5e5, 128)), Mlp(28672, "silu"), Norm(1e-5), Norm(1e-5))
    spec = ModelSpec((layer,) * 80, 128256, 8192, Norm(1e-5), 131072)
    assert min(seconds(spec) for _ in range(2)) < 1.0
