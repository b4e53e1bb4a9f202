"""Where rope_append and attention become one op, and where they must not."""

from __future__ import annotations

from penstock.compiler.passes import fuse_attention
from penstock.ir import Graph, Value, emit, leaf, tensor
from penstock.ir.rewrite import rewrite
from tests.null.passes.graphs import counts

BY_TOKEN, BY_ROW, TABLE = tensor("i32", "T"), tensor("i32", "S"), tensor("i32", "S", "M")


def _input(name: str, type: object) -> Value:
    return leaf("input", name, type)  # type: ignore[arg-type]


def _graph(heads: int = 4, other_table: bool = False, read_twice: bool = False, softcap: float | None = None) -> Graph:
    kv = leaf("state", "kv", tensor("bf16", "N", 2, 2, 16, 8))
    table, freqs = _input("table", TABLE), _input("freqs", tensor("f32", 1, 4))
    positions, rows = _input("positions", BY_TOKEN), _input("rows", BY_TOKEN)
    qkv = _input("qkv", tensor("bf16", "T", 64))
    q, after = emit("rope_append", qkv, kv, positions, freqs, rows, table, heads=4, scale=1.5).outputs
    spans = [_input(name, BY_ROW) for name in ("start", "count", "context")]
    own = _input("other", TABLE) if other_table else table
    y = emit("attention", q, after, *spans, own, heads=heads, scale=0.5, window=7, softcap=softcap)[0]
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


def test_queries_that_are_read_elsewhere_and_other_tables_are_left_alone() -> None:
    for graph in (_graph(read_twice=True), _graph(other_table=True)):
        assert fuse_attention.must(graph) == 0
        assert counts(rewrite(graph, fuse_attention.RULES).graph)["attention"] == 1
