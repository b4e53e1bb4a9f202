"""Odd sizes: padded inside, unchanged outside, and no cut at run time where the next product can take it."""

from __future__ import annotations

import pytest

from penstock.compiler import pipeline
from penstock.compiler.lower import lower
from penstock.compiler.passes import align
from penstock.ir import Graph, emit
from penstock.ir.rewrite import rewrite
from tests.golden.specs import FAMILIES, ODD, forward
from tests.null.passes.graphs import counts, graph, value, weight


def fused(case: str) -> Graph:
    return pipeline.run(forward(ODD[case]))[0]


@pytest.mark.parametrize("case", ODD)
def test_every_product_is_aligned_and_results_keep_their_types(case: str) -> None:
    built, after = forward(ODD[case]), fused(case)
    for node in after.nodes:
        if node.op in ("linear", "linear_glu"):
            assert int(node.types[0].shape[-1]) % 8 == 0 and int(node.inputs[1].type.shape[0]) % 8 == 0
    assert [v.type for v in after.outputs] == [v.type for v in built.outputs]


@pytest.mark.parametrize("case", ["odd F", "odd F, biases", "F of 4 more than 8, biases"])
def test_an_odd_feed_forward_costs_no_narrow(case: str) -> None:
    assert "narrow" not in counts(fused(case))


def test_an_odd_head_is_cut_and_its_tied_table_stored_once() -> None:
    lowered = lower(fused("odd V, tied"))
    assert counts(lowered.graph)["narrow"] == 1
    (table,) = (n.inputs[1] for n in lowered.graph.nodes if n.op == "embedding")
    (head,) = (n.inputs[1] for n in lowered.graph.nodes if n.op == "linear" and n.types[0].format.name == "f32")
    assert table == head and table.type.shape == (48, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_aligned_graphs_are_left_alone(family: str) -> None:
    built = forward(FAMILIES[family])
    after = rewrite(built, align.RULES)
    assert after.graph is built and align.must(built) == 0


def test_cut_columns_that_may_hold_anything_are_not_multiplied() -> None:
    """0 * inf is not 0: only columns known to be zero may meet zero weights."""
    cut = emit("narrow", value("x", 16), size=5)[0]
    after = rewrite(graph(emit("linear", cut, weight("w", 8, 5))[0]), align.RULES).graph
    assert counts(after) == {"narrow": 1, "linear": 1}


def test_plain_gates_push_the_cut_into_the_next_product() -> None:
    x = value("x", 8)
    gate, up = (emit("linear", x, weight(name, 5, 8), weight(f"{name}.b", 5))[0] for name in ("g", "u"))
    y = emit("linear", emit("glu", gate, up, act="silu")[0], weight("d", 8, 5))[0]
    after = rewrite(graph(y), align.RULES).graph
    assert counts(after) == {"linear": 3, "glu": 1, "pad": 5}


def test_what_stands_element_by_element_between_products_costs_no_cut() -> None:
    inner = emit("linear", value("x", 8), weight("u", 5, 8), weight("b", 5))[0]
    middle = emit("clip", emit("activate", inner, act="gelu")[0], limit=3.0)[0]
    after = rewrite(graph(emit("linear", middle, weight("d", 8, 5))[0]), align.RULES).graph
    assert counts(after) == {"linear": 2, "activate": 1, "clip": 1, "pad": 3}


def test_an_odd_head_is_cut_behind_its_cap() -> None:
    logits = emit("scale", emit("linear", value("x", 8), weight("w", 13, 8))[0], factor=0.5)[0]
    after = rewrite(graph(emit("softcap", logits, cap=30.0)[0]), align.RULES).graph
    assert counts(after) == {"linear": 1, "scale": 1, "softcap": 1, "narrow": 1, "pad": 1}
    assert after.outputs[0].node.op == "narrow"


def test_an_odd_activated_product_is_padded_and_the_next_takes_it_whole() -> None:
    inner = emit("linear_activate", value("x", 8), weight("u", 5, 8), weight("b", 5), act="gelu")[0]
    built = graph(emit("linear_activate", inner, weight("d", 8, 5), act="relu")[0])
    after = rewrite(built, align.RULES).graph
    assert align.must(built) == 1 and counts(after) == {"linear_activate": 2, "pad": 3}
    assert [n.attr("act") for n in after.nodes if n.op == "linear_activate"] == ["gelu", "relu"]
