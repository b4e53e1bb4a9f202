"""Passes change how a graph computes, never what: every pass, on every family and on random graphs, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.compiler import pipeline
from penstock.compiler.lower import lower
from penstock.ir import Graph
from penstock.ir.interpret import bisect, close, interpret
from tests.golden.specs import FAMILIES, ODD, forward
from tests.null.passes.graphs import graphs

CASES = FAMILIES | ODD
RELATIVE = 1e-5
BEFORE, OWN = [3, 0, 9], [4, 2, 1]  # tokens in the cache, tokens of the step; one more row is padding


def step() -> dict[str, Any]:
    """A ragged step of three sequences over scattered blocks."""
    length = torch.tensor(OWN)
    rows = torch.repeat_interleave(torch.arange(3), length)
    start = length.cumsum(0) - length
    positions = torch.tensor(BEFORE)[rows] + torch.arange(len(rows)) - start[rows]
    feed = {
        "tokens": torch.randint(0, 40, (8,)),
        "positions": torch.cat([positions, torch.zeros(1)]),
        "rows": torch.cat([rows, torch.tensor([-1])]),
        "query_start": start,
        "query_len": length,
        "context_len": torch.tensor(BEFORE) + length,
        "block_table": torch.randperm(15)[:9].view(3, 3) + 1,
        "logit_rows": torch.tensor([3, 5, 6]),
    }
    return {name: t.to(torch.int32) for name, t in feed.items()}


def feed_of(graph: Graph, seed: int = 0) -> dict[str, Any]:
    """Random numbers for every leaf but the step's integers."""
    torch.manual_seed(seed)
    feed = step()
    for node in graph.nodes:
        if node.is_leaf and node.name not in feed:
            shape = node.types[0].concrete({"N": 16, "T": 8})
            scale = shape[-1] ** -0.5 if node.op == "tensor" and len(shape) > 1 else 1.0
            feed[node.name] = torch.randn(shape) * scale
    return feed


def assert_same(a: Graph, b: Graph, feed: dict[str, Any]) -> None:
    want, got = (interpret(g, {k: t.clone() for k, t in feed.items()}) for g in (a, b))
    wrong = [name for name in want if not close(got[name], want[name], RELATIVE)]
    assert not wrong, f"{wrong} differ, first at {bisect(a, b, feed, RELATIVE)}"


@pytest.mark.parametrize("name", CASES)
def test_every_pass_keeps_the_results(name: str) -> None:
    built = forward(CASES[name], "f32")
    feed = feed_of(built)
    for result in pipeline.run(built)[1]:
        assert_same(built, result.graph, feed)


@pytest.mark.parametrize("name", CASES)
def test_a_lowered_graph_over_its_weights_gives_the_same(name: str) -> None:
    built = forward(CASES[name], "f32")
    feed = feed_of(built)
    lowered = lower(pipeline.run(built)[0])
    weights = {name: interpret(g, feed)["weight"] for name, g in lowered.weights.items()}
    step = {k: t.clone() for k, t in feed.items() if k not in {n.name for n in built.leaves("tensor")}}
    got = interpret(lowered.graph, step | weights)
    want = interpret(built, {k: t.clone() for k, t in feed.items()})
    assert all(close(got[k], want[k], RELATIVE) for k in want)


@given(graphs(), st.integers(0, 100))
def test_random_graphs_keep_their_results(graph: Graph, seed: int) -> None:
    fused, _ = pipeline.run(graph)
    assert_same(graph, fused, feed_of(graph, seed))


def test_the_comparison_sees_a_wrong_order_of_gate_and_up() -> None:
    built = forward(FAMILIES["llama"], "f32")
    text = str(pipeline.run(built)[0])
    from penstock.ir.text import parse_graph

    line = next(ln for ln in text.splitlines() if "concat(" in ln and "[128,32]" in ln)
    a, b = line.split("(")[1].split(")")[0].split(", ")
    swapped = parse_graph(text.replace(line, line.replace(f"({a}, {b})", f"({b}, {a})")))
    with pytest.raises(AssertionError, match="differ, first at"):
        assert_same(built, swapped, feed_of(built))
