"""Sharing: equal computations become one node, and nothing that writes state ever does."""

from __future__ import annotations

from penstock.compiler.passes.share import share
from penstock.ir import Value, emit, leaf, tensor
from penstock.ir.dialect import optimised, verify
from tests.null.passes.graphs import counts, graph, value, weight


def test_equal_computations_and_leaves_are_merged() -> None:
    def branch() -> Value:
        return emit("linear", value("x", 8), weight("w", 8, 8))[0]

    after = share(graph(emit("add", branch(), branch())[0]))
    assert counts(after.graph) == {"linear": 1, "add": 1}
    assert after.fired == {"share": 3}
    assert len(after.graph.leaves("tensor")) == 1


def test_attributes_types_and_results_tell_nodes_apart() -> None:
    x = value("x", 8)
    a, b = (emit("scale", x, factor=f)[0] for f in (0.0, -0.0))
    parts = emit("split", x, sizes=(4, 4)).outputs
    after = share(graph(emit("add", a, b)[0], emit("add", *parts)[0]))
    assert counts(after.graph) == {"scale": 2, "add": 2, "split": 1}


def test_state_ops_are_never_merged() -> None:
    kv = leaf("state", "kv", tensor("f32", "N", 2, 1, 4, 8))
    k, ids, table = value("k", 8), leaf("input", "i", tensor("i32", "T")), leaf("input", "b", tensor("i32", "S", "M"))
    first = emit("kv_append", kv, k, k, ids, ids, table)[0]
    second = emit("kv_append", first, k, k, ids, ids, table)[0]
    after = share(graph(second))
    assert counts(after.graph)["kv_append"] == 2
    verify(after.graph, optimised())
    forked = share(graph(first, emit("kv_append", kv, k, k, ids, ids, table)[0]))
    assert counts(forked.graph)["kv_append"] == 2  # merging would hide the mistake that verify reports
