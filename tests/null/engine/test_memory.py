"""The arena: no two values that live at the same time share a byte, and freed bytes are used again."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.compiler.memory import ALIASED, ALIGN, Arena, plan_memory
from penstock.compiler.phases import prepare_graph, sample_graph
from penstock.engine.profile import Profile
from penstock.engine.program import Phase, Plan, Site
from penstock.ir import Graph, emit, leaf, tensor
from penstock.ir.graph import Value
from penstock.ir.op import get

PROFILE = Profile(4, 64, 128)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5000)), max_size=60))
def test_taken_spans_never_overlap(moves: list[tuple[bool, int]]) -> None:
    arena, live = Arena(), list[tuple[int, int]]()
    for take, size in moves:
        if take or not live:
            start = arena.take(size)
            assert start % ALIGN == 0
            assert all(start + size <= other or other + length <= start for other, length in live)
            live.append((start, size))
        else:
            arena.give(*live.pop(size % len(live)))
    for span in live:
        arena.give(*span)
    assert sum(length for _, length in arena.free) == arena.end, "everything came back"


def _phases(workspace: int) -> dict[str, Phase]:
    tokens = leaf("input", "tokens", tensor("i32", "T"))
    rows = leaf("input", "logit_rows", tensor("i32", "L"))
    h = emit("embedding", tokens, leaf("weight", "table", tensor("f32", 50, 32)))[0]
    for layer in range(3):
        w = leaf("weight", f"w{layer}", tensor("f32", 32, 32))
        h = emit("add", h, emit("linear", h, w)[0])[0]
    logits = emit("linear", emit("take_rows", h, rows)[0], leaf("weight", "head", tensor("f32", 50, 32)))[0]
    graphs = {
        "prepare": prepare_graph(PROFILE),
        "forward": Graph((logits,), ("logits",)),
        "sample": sample_graph(PROFILE, 50),
    }
    return {
        name: Phase(g, {Site.of(n).key: {"b": Plan("x", (), workspace)} for n in g.nodes if not n.is_leaf})
        for name, g in graphs.items()
    }


@given(st.integers(1, 64), st.integers(0, 9000))
@settings(deadline=None, max_examples=25)
def test_values_alive_together_do_not_overlap(tokens: int, workspace: int) -> None:
    """Replays the plan: what a node reads must still hold what its producer wrote."""
    sizes = PROFILE.sizes(tokens, min(tokens, 4))
    phases = _phases(workspace)
    offsets, arena = plan_memory(phases, sizes, "b")
    written: dict[int, Value] = {}  # byte -> whose
    named: dict[str, Value] = {}

    def claim(start: int, size: int, owner: Value) -> None:
        assert start + size <= arena
        written.update(dict.fromkeys(range(start, start + size), owner))

    spans: dict[Value, tuple[int, int]] = {}
    for name, phase in phases.items():
        places = iter(offsets[name])
        inputs = {n[0]: named[n.name] for n in phase.graph.leaves("input") if n.name in named}
        for node in (n for n in phase.graph.nodes if not n.is_leaf):
            aliased = set((get(node.op).writes or {}).values())
            for value in node.outputs:
                start = next(places)
                assert (start == ALIASED) == (value.index in aliased)
                if start != ALIASED:
                    spans[value] = (start, value.type.nbytes(sizes))
                    claim(*spans[value], value)
            claim(next(places), workspace, node[0])
            for value in node.outputs:  # the workspace must not have hit the results
                if value in spans:
                    start, size = spans[value]
                    assert not workspace or all(
                        written[b] == value or value == node[0] for b in range(start, start + size)
                    )
            for value in node.inputs:
                source = inputs.get(value, value)
                if source in spans:
                    start, size = spans[source]
                    assert {written[b] for b in range(start, start + size)} <= {source}, f"{node.op} reads a lost value"
        named.update(zip(phase.graph.names, phase.graph.outputs, strict=True))
    start, size = spans[named["sampled"]]
    assert {written[b] for b in range(start, start + size)} <= {named["sampled"]}
