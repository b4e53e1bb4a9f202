"""Experts' arrays stay out of the passes' way, and come back as they were."""

from __future__ import annotations

from penstock.compiler import pipeline
from penstock.compiler.lower import lower
from penstock.compiler.seal import seal, unseal
from penstock.ir import Graph, emit
from penstock.ir.dialect import optimised, verify
from penstock.ir.text import print_graph
from penstock.models import build_forward, read_spec, weights
from tests.facts.tensors import published_config
from tests.golden.specs import GOLDEN, forward
from tests.null.passes.graphs import graph, value, weight

LAYERS, EXPERTS = 3, 16


def mixture() -> Graph:
    """A Qwen3-MoE of a few layers, over tensors of the published names."""
    config = published_config("Qwen3-30B-A3B") | {"num_hidden_layers": LAYERS, "num_experts": EXPERTS}
    spec = read_spec(config)
    return build_forward(spec, weights(spec, config, "bf16"), "bf16", 64)


def test_passes_see_no_expert() -> None:
    built = mixture()
    fused, results = pipeline.run(built)
    experts = LAYERS * EXPERTS * 3
    assert results[0].nodes_before == len(built.nodes) - experts - 2 * LAYERS  # a concat and a reshape are one leaf
    assert [n.name for n in results[-1].graph.leaves("weight")] == [f"sealed {i}" for i in range(2 * LAYERS)]
    assert not fused.leaves("weight") and len(fused.leaves("tensor")) == len(built.leaves("tensor")) > experts
    verify(fused, optimised())


def test_they_come_back_as_they_were() -> None:
    built = mixture()
    assert print_graph(unseal(*seal(built))) == print_graph(built)
    lowered = lower(pipeline.run(built)[0])
    stacked = lowered.weights["model.layers.1.mlp.experts.0.gate_proj+...+15.up_proj.weight"]
    names = [n.name.removeprefix("model.layers.1.mlp.experts.") for n in stacked.leaves("tensor")]
    assert names == [f"{i}.{part}_proj.weight" for i in range(EXPERTS) for part in ("gate", "up")]


def test_an_array_of_two_readers_has_one_leaf() -> None:
    w_in = emit("concat", weight("a", 2, 16, 8), weight("b", 2, 16, 8), dim=0)[0]
    w_out = emit("concat", weight("c", 2, 8, 8), weight("d", 2, 8, 8), dim=0)[0]
    routed = emit("route", value("scores", 4), chosen=2, score="softmax", renormalize=1.0)
    first = emit("moe", value("x", 8), *routed.outputs, w_in, w_out, act="silu")[0]
    sealed, held = seal(graph(emit("moe", first, *routed.outputs, w_in, w_out, act="silu")[0]))
    assert len(sealed.leaves("weight")) == len(held) == 2


def test_what_has_no_expression_is_left_alone() -> None:
    for family in ("llama", "mixtral"):  # the golden mixture's arrays are tensors of the checkpoint
        built = forward(GOLDEN[family])
        assert seal(built) == (built, {})
