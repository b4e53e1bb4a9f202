"""The graph language: typed, printed, parsed, verified; every refusal says what and why."""

from __future__ import annotations

import subprocess
import sys

import pytest

from penstock import formats
from penstock.errors import GraphError
from penstock.ir import Graph, Value, emit, leaf, tensor
from penstock.ir.dialect import built, lowered, optimised, verify
from penstock.ir.graph import Node
from penstock.ir.op import get, parts_graph, vocabulary
from penstock.ir.rewrite import Match, rewrite
from penstock.ir.text import graph_from_json, graph_to_json, parse_graph, parse_type


def small() -> Graph:
    x = leaf("input", "x", tensor("bf16", "T", 64))
    h = emit("add_rms_norm", x, x, leaf("tensor", "w", tensor("bf16", 64)), eps=1e-6)
    y = emit("linear", h[0], leaf("tensor", "m", tensor("bf16", 32, 64)), out="f32")[0]
    return Graph((y, h[1]), ("y", "residual"))


def test_a_graph_prints_parses_and_hashes_to_itself() -> None:
    graph = small()
    assert str(parse_graph(str(graph))) == str(graph)
    assert graph_from_json(graph_to_json(graph)).key() == graph.key()
    assert small().key() == graph.key()
    assert '%3 = add_rms_norm(%0, %0, %1) {"eps": 1e-06} : bf16[T,64], bf16[T,64]'.replace("%3", "%2") in str(graph)


def test_types_print_and_parse() -> None:
    for text in ("bf16[T,4096]", "i32[S]", "f32[]", "f16[N,2,8,64,128]"):
        assert str(parse_type(text)) == text
    assert parse_type("bf16[T,8]").nbytes({"T": 3}) == 48


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('%0 = input() {"name": "x"} : bf16[T]', "no 'return' line"),
        ("%1 = input() : bf16[T]\nreturn x=%1", "cannot read graph line 0"),
        ('%0 = input() {"name": "x"} : q7[T]\nreturn x=%0', "unknown number format 'q7'"),
    ],
)
def test_unreadable_text_is_named(text: str, named: str) -> None:
    with pytest.raises(GraphError, match=named):
        parse_graph(text)


def test_ops_refuse_operands_that_do_not_fit() -> None:
    x = leaf("input", "x", tensor("bf16", "T", 64))
    with pytest.raises(GraphError, match=r"linear\(bf16\[T,64\], bf16\[8,32\]\).*inner sizes 64 and 32 differ"):
        emit("linear", x, leaf("tensor", "w", tensor("bf16", 8, 32)))
    with pytest.raises(GraphError, match="unknown op 'convolve'"):
        emit("convolve", x)
    with pytest.raises(GraphError, match="activation 'swash'"):
        emit("glu", x, x, act="swash")


def test_each_dialect_has_its_border() -> None:
    verify(small(), optimised())
    with pytest.raises(GraphError, match="'add_rms_norm' is not legal in the built dialect"):
        verify(small(), built())
    with pytest.raises(GraphError, match="'tensor' is not legal in the lowered dialect"):
        verify(small(), lowered())


def test_a_node_with_wrong_types_is_found() -> None:
    x = leaf("input", "x", tensor("bf16", "T", 64))
    lie = Node("scale", (x,), (("factor", 2.0),), (tensor("bf16", "T", 65),))
    with pytest.raises(GraphError, match=r"scale has types \['bf16\[T,65\]'\]"):
        verify(Graph((lie[0],), ("y",)), built())


def test_state_is_threaded_never_forked() -> None:
    kv = leaf("state", "kv", tensor("f32", "N", 2, 1, 16, 8))
    k = leaf("input", "k", tensor("f32", "T", 8))
    at = [leaf("input", n, tensor("i32", "T")) for n in ("positions", "rows")]
    table = leaf("input", "table", tensor("i32", "S", "M"))
    first = emit("kv_append", kv, k, k, *at, table)[0]
    second = emit("kv_append", first, k, k, *at, table)[0]
    verify(Graph((second,), ("kv",)), built())
    fork = emit("kv_append", kv, k, k, *at, table)[0]
    with pytest.raises(GraphError, match="already replaced"):
        verify(Graph((first, fork), ("a", "b")), built())


def test_fused_ops_type_as_their_parts_do() -> None:
    fused = [o.name for o in vocabulary() if o.parts is not None]
    assert {"add_rms_norm", "linear_glu", "packed_glu", "rope_append"} <= set(fused)
    types = (tensor("f16", "T", 64), tensor("f16", 96, 64))
    graph = parts_graph("linear_glu", types, (("act", "silu"),))
    assert [n.op for n in graph.nodes if not n.is_leaf] == ["linear", "packed_glu"]
    assert get("linear_glu").types(types, {"act": "silu"}) == (tensor("f16", "T", 48),)


def test_rules_run_to_fixpoint_and_are_counted() -> None:
    def halve(match: Match) -> dict[Value, Value] | None:
        node = match.node
        if node.op != "scale" or node.attr("factor") <= 1:
            return None
        return {node[0]: emit("scale", node.inputs[0], factor=node.attr("factor") / 2)[0]}

    x = leaf("input", "x", tensor("f32", "T", 4))
    done = rewrite(Graph((emit("scale", x, factor=8.0)[0],), ("y",)), (halve,))
    assert done.fired == {"halve": 3}
    assert done.graph.outputs[0].node.attr("factor") == 1.0


def test_graph_work_needs_no_torch() -> None:
    modules = "penstock.models, penstock.compiler.pipeline, penstock.engine.manifest"
    program = f"import sys; import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_importing_the_package_loads_nothing() -> None:
    program = "import sys; import penstock; sys.exit(bool({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_formats_are_found_by_name() -> None:
    assert formats.parse("bf16").bytes == 2
    with pytest.raises(GraphError, match=r"unknown number format 'int3'.*bf16"):
        formats.parse("int3")
