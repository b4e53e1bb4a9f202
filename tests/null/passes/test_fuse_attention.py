"""Where rope_append and attention become one op, and where they must not."""

from __future__ import annotations

from penstock.compiler.passes import fuse_attention
from penstock.ir import Graph, Value, emit, leaf, tensor
from penstock.ir.op import parts_graph
from penstock.ir.rewrite import rewrite
from tests.null.passes.graphs import counts

BY_TOKEN, BY_ROW, TABLE = tensor("i32", "T"), tensor("i32", "S"), tensor("i32", "S", "M")


def _input(name: str, type: object) -> Value:
    return leaf("input", name, type)  # type: ignore[arg-type]


def _graph(
    heads: int = 4, other_table: bool = False, read_twice: bool = False, softcap: float | None = None,
    interleaved: bool | None = None, extras: tuple[str, ...] = (),
) -> Graph:  # fmt: skip
    kv = leaf("state", "kv", tensor("bf16", "N", 2, 2, 16, 8))
    table, freqs = _input("table", TABLE), _input("freqs", tensor("f32", 1, 4))
    positions, rows = _input("positions", BY_TOKEN), _input("rows", BY_TOKEN)
    qkv = _input("qkv", tensor("bf16", "T", 64))
    q, after = emit(
        "rope_append", qkv, kv, positions, freqs, rows, table, heads=4, scale=1.5, interleaved=interleaved
    ).outputs
    spans = [_input(name, BY_ROW) for name in ("start", "count", "context")]
    own = _input("other", TABLE) if other_table else table
    given = [_input(name, tensor("f32", heads)) for name in extras]
    options = {"window": 7, "softcap": softcap, "extras": extras or None}
    y = emit("attention", q, after, *spans, own, *given, heads=heads, scale=0.5, **options)[0]
    if read_twice:
        y = emit("add", y, q)[0]
    return Graph((y, after), ("y", "kv"))


def test_both_scales_and_every_option_are_kept() -> None:
    graph = _graph(softcap=30.0)
    fused = rewrite(graph, fuse_attention.RULES).graph
    assert fuse_attention.must(graph) == 1 and counts(fused) == {"rope_attention": 1}
    node = fused.outputs[0].node
    assert dict(node.attrs) == {"heads": 4, "scale": 0.5, "factor": 1.5, "window": 7, "softcap": 30.0}
    assert fused.outputs[1] == node[1]


def test_what_belongs_to_heads_and_how_pairs_lie_are_kept() -> None:
    graph = _graph(interleaved=True, extras=("slopes", "sinks"))
    node = rewrite(graph, fuse_attention.RULES).graph.outputs[0].node
    assert node.op == "rope_attention" and [v.node.name for v in node.inputs[-2:]] == ["slopes", "sinks"]
    assert (node.attr("extras"), node.attr("interleaved")) == (("slopes", "sinks"), True)
    parts = {n.op: n for n in parts_graph(node.op, tuple(v.type for v in node.inputs), node.attrs).nodes}
    assert parts["rope_append"].attr("interleaved") and parts["attention"].attr("extras") == ("slopes", "sinks")
    assert len(parts["rope_append"].inputs) == 6 and len(parts["attention"].inputs) == 8


def test_queries_that_are_read_elsewhere_and_other_tables_are_left_alone() -> None:
    for graph in (_graph(read_twice=True), _graph(other_table=True)):
        assert fuse_attention.must(graph) == 0
        assert counts(rewrite(graph, fuse_attention.RULES).graph)["attention"] == 1
