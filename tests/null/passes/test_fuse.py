"""What the fusions make of each family, and where they must not fire."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from penstock.compiler import pipeline
from penstock.compiler.lower import lower
from penstock.compiler.passes import fuse_block, fuse_glu, fuse_norm, fuse_qkv, fuse_rope, sink_rows
from penstock.compiler.passes.fuse_qkv import projections
from penstock.ir import Graph, Node, Value, emit, leaf, tensor
from penstock.ir.op import parts_graph
from penstock.ir.rewrite import rewrite, substitute
from tests.golden.specs import FAMILIES, ODD, decoder, forward, mixer
from tests.null.passes.graphs import counts, graph, value, weight

LAYER = ["rope_attention", "dense_block"]
BEFORE = {"embedding", "scale"}
LAST = ["rope_attention", "take_rows", "take_rows", "linear_norm_linear", "linear", "add_rms_norm", "linear"]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_nodes_a_layer(family: str) -> None:
    lowered = lower(pipeline.run(forward(FAMILIES[family]))[0])
    ops = [n.op for n in lowered.graph.nodes if not n.is_leaf]
    body = [op for op in ops if op not in BEFORE]
    assert body == ["rms_norm", "linear", *LAYER, *LAST]
    assert ops[: len(ops) - len(body)] == (["embedding", "scale"] if family == "gemma" else ["embedding"])


@pytest.mark.parametrize("family", FAMILIES)
def test_fired_counts(family: str) -> None:
    _, results = pipeline.run(forward(FAMILIES[family]))
    fired = {r.name: sum(r.fired.values()) for r in results}
    want = {"share": 0, "fold": 0, "sink_rows": 8, "fuse_qkv": 2, "fuse_glu": 4, "fuse_norm": 4}
    want |= {"fuse_rope": 2, "fuse_attention": 2, "align": 0, "fuse_block": 3, "join_blocks": 1}
    want |= {"share_rows": 0, "fold_fused": 0, "share_fused": 0}
    assert fired == want


def test_rows_are_picked_before_work_that_only_they_need() -> None:
    picked = leaf("input", "rows", tensor("i32", "L"))
    x, w = value("x", 8), weight("w", 8, 8)
    product = emit("linear", x, w)[0]
    both = emit("add", product, product)[0]
    after = rewrite(graph(emit("take_rows", both, picked)[0]), sink_rows.RULES).graph
    assert [n.op for n in after.nodes if not n.is_leaf] == ["take_rows", "linear", "add"]
    elsewhere = graph(emit("take_rows", product, picked)[0], product)
    assert rewrite(elsewhere, sink_rows.RULES).graph is elsewhere


def test_products_across_the_residual_stream_are_fused_only_where_nothing_else_reads_between() -> None:
    x, r, g = value("x", 8), value("r", 16), weight("g", 16)
    inner = emit("linear", x, weight("w1", 16, 8))[0]
    normal, total = emit("add_rms_norm", r, inner, g, eps=1e-5).outputs
    y = emit("linear", normal, weight("w2", 24, 16), weight("b", 24))[0]
    fused = rewrite(graph(y, total), fuse_block.RULES).graph
    assert counts(fused) == {"linear_norm_linear": 1} and fused.outputs[0].node.inputs[2] == r
    for read in (inner, normal):
        kept = graph(y, total, read)
        assert fuse_block.must(kept) == 0 and rewrite(kept, fuse_block.RULES).graph is kept


def block(act: str = "silu", eps: float = 1e-5) -> tuple[Value, Value, Value, Value]:
    """h and total of a gated linear_norm_linear, y and total of one that reads them, with a bias."""
    stream, gain = value("r", 16), weight("g", 16)
    gate = {"act": act} if act else {}
    w = weight("w2", 64 if act else 32, 16)
    h, total = emit("linear_norm_linear", value("x", 8), weight("w1", 16, 8), stream, gain, w, eps=1e-5, **gate).outputs
    rest = weight("w3", 16, 32), total, weight("g2", 16), weight("w4", 24, 16), weight("b", 24)
    return h, total, *emit("linear_norm_linear", h, *rest, eps=eps).outputs


def test_both_halves_of_a_layer_become_one_and_keep_their_order() -> None:
    _, _, y, total = block()
    joined = rewrite(graph(y, total), fuse_block.JOINS).graph
    assert counts(joined) == {"dense_block": 1}
    (node,) = {v.node for v in joined.outputs}
    assert [v.node.name for v in node.inputs] == ["x", "w1", "r", "g", "w2", "w3", "g2", "w4", "b"]
    parts = parts_graph("dense_block", tuple(v.type for v in node.inputs), node.attrs)
    assert [n.op for n in parts.nodes if not n.is_leaf] == ["linear_norm_linear"] * 2


@pytest.mark.parametrize(("options", "read"), [({}, 0), ({}, 1), ({"act": ""}, None), ({"eps": 1e-6}, None)])
def test_halves_stay_apart_where_others_read_between_or_they_differ(options: Any, read: int | None) -> None:
    values = block(**options)
    kept = graph(*values[2:], *([] if read is None else [values[read]]))
    assert fuse_block.must_join(kept) == 0 and rewrite(kept, fuse_block.JOINS).graph is kept


def test_biases_are_stacked_and_gates_with_biases_stay_packed() -> None:
    fused, _ = pipeline.run(forward(ODD["F of 4 more than 8, biases"]))
    assert counts(fused)["packed_glu"] == 2 and "linear_glu" not in counts(fused)


def test_rows_of_a_stacked_weight_are_q_k_v_and_gate_up() -> None:
    fused, _ = pipeline.run(forward(FAMILIES["llama"]))
    stacks = [[v.node.name for v in n.inputs] for n in fused.nodes if n.op == "concat"]
    assert stacks[0] == [f"model.layers.0.attention.{p}.weight" for p in "qkv"]
    assert stacks[1] == [f"model.layers.0.feedforward.{p}.weight" for p in ("gate", "up")]


def test_head_norms_and_their_numbers_go_into_rope_attention() -> None:
    fused, _ = pipeline.run(forward(FAMILIES["qwen3"]))
    (node, _) = (n for n in fused.nodes if n.op == "rope_attention")
    assert [v.node.name for v in node.inputs[-2:]] == [f"model.layers.0.attention.{p}_norm.weight" for p in "qk"]
    assert (node.attr("eps"), node.attr("heads")) == (1e-6, 4)


def edited(g: Graph, op: str, nth: int, **attrs: object) -> Graph:
    """The graph with attributes of the nth node of an op changed."""
    node: Node = [n for n in g.nodes if n.op == op][nth]
    return substitute(g, {node[0]: emit(op, *node.inputs, **{**dict(node.attrs), **attrs})[0]})


def test_differing_angles_or_norms_of_q_and_k_are_not_fused() -> None:
    split = rewrite(forward(FAMILIES["qwen3"]), fuse_qkv.RULES).graph
    for g in (edited(split, "rope", 0, scale=2.0), edited(split, "head_rms_norm", 1, eps=0.5)):
        assert fuse_rope.must(g) == 1
        assert counts(rewrite(g, fuse_rope.RULES).graph)["rope_append"] == 1


def test_how_pairs_lie_is_kept_where_queries_and_keys_agree() -> None:
    one = edited(rewrite(forward(FAMILIES["llama"]), fuse_qkv.RULES).graph, "rope", 0, interleaved=True)
    assert fuse_rope.must(one) == 1  # of two layers; in the other queries and keys differ
    both = edited(one, "rope", 1, interleaved=True)
    fused = rewrite(both, fuse_rope.RULES).graph
    pairs = [dict(n.attrs).get("interleaved") for n in fused.nodes if n.op == "rope_append"]
    assert fuse_rope.must(both) == 2 and pairs == [True, None]


def test_queries_keys_and_values_that_are_clipped_are_clipped_at_once() -> None:
    built = forward(FAMILIES["llama"])
    linears = projections(next(n for n in built.nodes if n.op == "attention"))
    assert linears
    clips = {n[0]: emit("clip", emit("linear", *n.inputs)[0], limit=8.0)[0] for n in linears}
    clipped = substitute(built, clips)
    split = rewrite(clipped, fuse_qkv.RULES).graph
    assert fuse_qkv.must(clipped) == 2 and counts(split)["clip"] == 3
    fused = rewrite(split, fuse_rope.RULES).graph
    assert fuse_rope.must(split) == 2 and counts(fused)["clip"] == 1 and counts(fused)["rope_append"] == 2
    uneven = edited(split, "clip", 0, limit=9.0)
    assert fuse_rope.must(uneven) == 1 and counts(rewrite(uneven, fuse_rope.RULES).graph)["clip"] == 3


def test_linears_with_and_without_bias_are_not_stacked() -> None:
    x, w, b = value("x", 8), [weight(f"w{i}", 8, 8) for i in range(2)], weight("b", 8)
    pair = emit("linear", x, w[0], b)[0], emit("linear", x, w[1])[0]
    g = graph(emit("glu", *pair, act="silu")[0])
    assert fuse_glu.must(g) == 0
    assert counts(rewrite(g, fuse_glu.RULES).graph) == {"linear": 2, "glu": 1}


def gated(x: Value, y: Value) -> tuple[Value, Value, Value]:
    gate, up = emit("linear", x, weight("g", 16, 8))[0], emit("linear", y, weight("u", 16, 8))[0]
    return gate, up, emit("glu", gate, up, act="silu")[0]


def test_gates_of_two_values_and_gates_read_elsewhere_are_not_fused() -> None:
    x, y = value("x", 8), value("y", 8)
    gate, _, result = gated(x, x)
    for g in (graph(gated(x, y)[2]), graph(gate, result), graph(emit("scale", gate, factor=2.0)[0], result)):
        assert fuse_glu.must(g) == 0
        assert counts(rewrite(g, fuse_glu.RULES).graph)["glu"] == 1


def test_a_gate_that_is_fused_in_the_checkpoint() -> None:
    product = emit("linear", value("x", 8), weight("gate_up", 32, 8))[0]
    gate, up = emit("split", product, sizes=(16, 16)).outputs
    after = rewrite(graph(emit("glu", gate, up, act="silu")[0]), fuse_glu.RULES).graph
    assert counts(after) == {"linear_glu": 1}
    swapped = rewrite(graph(emit("glu", up, gate, act="silu")[0]), fuse_glu.RULES).graph
    assert counts(swapped) == {"linear": 1, "split": 1, "glu": 1}


def test_second_norm_of_a_sum_and_operand_order() -> None:
    x, y = value("x", 8), value("y", 8)
    total = emit("add", x, y)[0]
    norms = [emit("rms_norm", total, weight(f"n{i}", 8), eps=1e-5)[0] for i in range(2)]
    g = graph(*norms, total)
    after = rewrite(g, fuse_norm.RULES).graph
    assert fuse_norm.must(g) == 1
    assert counts(after) == {"add_rms_norm": 1, "rms_norm": 1}
    fused = after.outputs[0].node
    assert fused.inputs[:2] == (x, y) and after.outputs[2] == fused[1]


def test_layer_norms_take_the_sum_before_them_with_or_without_a_bias() -> None:
    for bias in ((), (weight("b", 8),)):
        total = emit("add", value("x", 8), value("y", 8))[0]
        g = graph(emit("layer_norm", total, weight("n", 8), *bias, eps=1e-5)[0], total)
        after = rewrite(g, fuse_norm.RULES).graph
        assert fuse_norm.must(g) == 1 and counts(after) == {"add_layer_norm": 1}
        assert after.outputs[0].node.inputs[3:] == bias and after.outputs[1] == after.outputs[0].node[1]


def test_a_checkpoint_whose_qkv_is_one_tensor_keeps_it() -> None:
    from penstock.models.binding import bind
    from penstock.models.decoder import build_forward

    spec = decoder(mixer(), FAMILIES["llama"].layers[0].feedforward, FAMILIES["llama"].final_norm)
    binding = bind(spec, "bf16", lambda wanted: wanted.name)
    whole = weight("layers.0.qkv.weight", 64, 32, format="bf16")
    for part, start, stop in (("q", 0, 32), ("k", 32, 48), ("v", 48, 64)):
        binding[f"layers.0.attention.{part}.weight"] = emit("slice", whole, dim=0, start=start, stop=stop)[0]
    fused, _ = pipeline.run(build_forward(spec, binding, "bf16", 4))
    assert "slice" not in counts(fused)
    assert "layers.0.qkv.weight" in lower(fused).weights


def test_fused_counts_are_linear_in_layers() -> None:
    def ops(layers: int) -> Counter[str]:
        spec = FAMILIES["llama"]
        many = decoder(spec.layers[0].mixer, spec.layers[0].feedforward, spec.final_norm)
        object.__setattr__(many, "layers", spec.layers[:1] * layers)
        return counts(lower(pipeline.run(forward(many))[0]).graph)

    assert ops(4) - ops(3) == Counter(LAYER)


def test_an_activation_goes_into_the_product_that_it_alone_reads() -> None:
    for bias in ((), (weight("b", 16),)):
        product = emit("linear", value("x", 8), weight("w", 16, 8), *bias)[0]
        y = emit("activate", product, act="relu2")[0]
        after = rewrite(graph(y), fuse_glu.RULES).graph
        assert fuse_glu.must(graph(y)) == 1 and counts(after) == {"linear_activate": 1}
        assert after.outputs[0].node.inputs[2:] == bias and after.outputs[0].node.attr("act") == "relu2"
        kept = graph(y, product)
        assert fuse_glu.must(kept) == 0 and rewrite(kept, fuse_glu.RULES).graph is kept
    finer = emit("linear", value("x", 8, "bf16"), weight("v", 16, 8, format="bf16"), out="f32")[0]
    kept = graph(emit("activate", finer, act="relu")[0])
    assert fuse_glu.must(kept) == 0 and rewrite(kept, fuse_glu.RULES).graph is kept
