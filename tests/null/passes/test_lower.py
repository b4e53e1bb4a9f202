"""Weights cut out of the graph: their names, their expressions, and what is shared."""

from __future__ import annotations

import pytest

from penstock.compiler import pipeline
from penstock.compiler.lower import Lowered, lower
from penstock.errors import GraphError
from penstock.ir import Graph, Node, Value, emit
from penstock.ir.dialect import lowered, verify
from tests.golden.specs import FAMILIES, ODD, forward
from tests.null.passes.graphs import counts, graph, value, weight


def one(op: str, *inputs: Value, **attrs: object) -> Value:
    return emit(op, *inputs, **attrs)[0]


def of(name: str) -> Lowered:
    return lower(pipeline.run(forward((FAMILIES | ODD)[name]))[0])


@pytest.mark.parametrize("name", [*FAMILIES, *ODD])
def test_every_leaf_has_an_expression_of_its_type_over_tensors_alone(name: str) -> None:
    result = of(name)
    verify(result.graph, lowered())
    leaves = {n.name: n.types[0] for n in result.graph.leaves("weight")}
    assert leaves == {name: g.outputs[0].type for name, g in result.weights.items()}
    for expression in result.weights.values():
        assert expression.names == ("weight",)
        assert all(n.op == "tensor" or not n.is_leaf for n in expression.nodes)


@pytest.mark.parametrize("name", [*FAMILIES, *ODD])
def test_no_tensor_is_lost(name: str) -> None:
    tensors = {n.name for n in forward((FAMILIES | ODD)[name]).leaves("tensor")}
    assert {n.name for g in of(name).weights.values() for n in g.leaves("tensor")} == tensors


def test_names_of_a_layer() -> None:
    names = list(of("qwen2").weights)
    assert names[:9] == [
        "model.embedding.weight",
        "model.layers.0.mixer_norm.weight",
        "model.layers.0.attention.q+k+v.weight",
        "model.layers.0.attention.q+k+v.bias",
        "literal.0",
        "model.layers.0.attention.o.weight",
        "model.layers.0.feedforward_norm.weight",
        "model.layers.0.feedforward.gate+up.weight",
        "model.layers.0.feedforward.down.weight",
    ]
    assert len(names) == 9 + 7 + 1  # another layer, whose literal is shared, and the final norm; the head is tied


def test_equal_expressions_are_one_weight_and_different_ones_have_different_names() -> None:
    x, a = value("x", 8), weight("a", 8, 8)
    products = [one("linear", x, w) for w in (a, one("transpose", a), one("transpose", weight("a", 8, 8)))]
    result = lower(graph(*products))
    assert list(result.weights) == ["a", "a.1"]
    assert counts(result.weights["a.1"]) == {"transpose": 1}


def test_names_do_not_collide_with_tensors_so_called() -> None:
    x = value("x", 8)
    ws = [weight("a", 8, 8), one("transpose", weight("a", 8, 8)), weight("a.1", 8, 8)]
    result = lower(graph(*(one("linear", x, w) for w in ws)))
    assert list(result.weights) == ["a", "a.1", "a.1.1"]
    assert [g.leaves("tensor")[0].name for g in result.weights.values()] == ["a", "a", "a.1"]
    again = lower(graph(*(one("linear", x, w) for w in (ws[2], ws[0], ws[1]))))
    assert list(again.weights) == ["a.1", "a", "a.2"]


def test_weights_without_tensors_and_of_many() -> None:
    x = value("x", 8)
    made = [one("random", shape=(8, 8), format="f32", seed=s, std=1.0) for s in (1, 2, 1)]
    many = one("concat", *(weight(f"experts.{i}.w", 2, 8) for i in range(9)), dim=0)
    result = lower(graph(*(one("linear", x, w) for w in (*made, many))))
    assert list(result.weights) == ["random.0", "random.1", "experts.0+...+8.w"]


def test_a_result_that_is_a_weight() -> None:
    result = lower(graph(one("transpose", weight("a", 2, 3))))
    assert result.graph.outputs[0].node.op == "weight"


def test_a_weight_op_over_a_value_of_the_step_is_refused() -> None:
    x = value("x", 8)
    wrong = Node("pad", (x,), (("dim", 1), ("size", 8)), (x.type,))
    with pytest.raises(GraphError, match="'pad' reads a result of 'input'"):
        lower(Graph((wrong[0],), ("y",)))
