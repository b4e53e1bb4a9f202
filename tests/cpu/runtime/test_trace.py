"""Timelines: whose time is whose, in records made up to be checked by hand and in steps of a real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.bench.timeline import Run, fold, losses, timeline
from penstock.engine import store
from penstock.engine.program import PLAIN
from penstock.errors import OptionError
from penstock.ir.graph import Node
from penstock.runtime.batch import Batch, Standing
from penstock.runtime.open import Memory, open_backend
from penstock.runtime.trace import Span, median_spans, node_spans, split


def nodes(count: int) -> list[tuple[str, Node]]:
    return [("forward", Node(f"op{i}", (), (), ())) for i in range(count)]


def spans(*times: tuple[float, float]) -> list[Span]:
    return [Span("kernel", start, end) for start, end in times]


def test_busy_gaps_and_overlaps_make_up_the_step() -> None:
    """Two launches back to back, a gap, one that starts early, one wholly within its predecessor, a node of none."""
    seen = node_spans(nodes(5), [2, 1, 1, 0, 1], spans((0, 4), (4, 6), (8, 20), (15, 23), (21, 22)))
    assert [n.busy for n in seen] == [6, 12, 3, 0, 0]
    assert [n.gap for n in seen] == [0, 2, 0, 0, 0]
    assert [n.overlap for n in seen] == [0, 0, 5, 0, 2]
    assert [n.launches for n in seen] == [2, 1, 1, 0, 1]
    last = max(n.end for n in seen[:3])
    assert sum(n.busy + n.gap for n in seen) == last == 23


def test_a_gap_within_a_node_is_counted() -> None:
    (seen,) = node_spans(nodes(1), [2], spans((1, 2), (5, 9)))
    assert (seen.gap, seen.busy, seen.start, seen.end) == (1 + 3, 1 + 4, 1, 9)


def test_the_median_is_taken_launch_by_launch() -> None:
    steps = [spans((0, 2), (2, 3)), spans((0, 9), (9, 10)), spans((0, 3), (3, 4))]
    assert median_spans(steps) == spans((0, 3), (3, 4))


def event(name: str, ts: float, dur: float = 1.0, cat: str = "kernel") -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_steps_lie_between_an_upload_and_a_copy_back() -> None:
    up, down = "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pinned)"
    events = [
        event("stray", 1), event(up, 2, cat="gpu_memcpy"), event("b", 6.5), event("a", 4, 2.5),
        event("Memset", 8, cat="gpu_memset"), event(down, 10, cat="gpu_memcpy"), event("cpu", 11, cat="cuda_runtime"),
        event("stray", 12), event(up, 13, cat="gpu_memcpy"), event("a", 15), event(down, 17, cat="gpu_memcpy"),
        {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    first, second = split(events)
    assert first == [Span("a", 0, 2.5), Span("b", 2.5, 3.5), Span("Memset", 4, 5)]
    assert second == [Span("a", 0, 1)]
    without = [e for e in events if e["name"] not in (up, "stray")]  # an upload that the device has already
    assert list(split(without)) == [first, second]


@pytest.mark.parametrize(
    ("keys", "runs"),
    [
        ("abc", [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
        ("xababaz", [(0, 1, 1), (1, 2, 2), (5, 1, 1), (6, 1, 1)]),
        ("aaab", [(0, 1, 3), (3, 1, 1)]),
        ("pabcabcabcq", [(0, 1, 1), (1, 3, 3), (10, 1, 1)]),
        ("", []),
    ],
)
def test_layers_that_look_alike_are_folded(keys: str, runs: list[tuple[int, int, int]]) -> None:
    found = list(fold(keys))
    assert found == [Run(*run) for run in runs]
    assert "".join(keys[r.start : r.start + r.length] * r.count for r in found) == keys


def test_a_standing_batch_is_the_same_step_each_time(tiny_engine: Path) -> None:
    engine, batch = store.load(tiny_engine), Batch(rows=3, context=70, tokens=2)
    backend = open_backend(engine, tiny_engine, Memory(), batch.limits(engine.profile))
    standing = Standing(engine, backend, batch)
    first, lengths = standing.run(), backend.states["slots"][:3].tolist()
    assert lengths == [72] * 3 and len(first) == 3
    assert [standing.run() for _ in range(3)] == [first] * 3
    assert backend.states["slots"][:3].tolist() == lengths
    assert backend.num_blocks == (1 + 3 * 2,)  # no more of the pool than the batch takes
    backend.close()


@pytest.mark.parametrize("batch", [Batch(rows=5), Batch(rows=0), Batch(tokens=25), Batch(3, 0, 9), Batch(context=255)])
def test_a_step_that_the_engine_cannot_run_is_refused(tiny_engine: Path, batch: Batch) -> None:
    with pytest.raises(OptionError, match="which the engine was built for"):
        batch.limits(store.load(tiny_engine).profile)


def test_every_node_of_a_cpus_step_is_timed_in_order(tiny_engine: Path) -> None:
    engine = store.load(tiny_engine)
    line = timeline(engine, tiny_engine, Batch(rows=2, context=10), Memory(), print)
    phases = engine.programs["decode"].phases
    wanted = [(name, n.op) for name in PLAIN for n in phases[name].graph.nodes if not n.is_leaf]
    assert [(n.phase, n.op) for n in line.nodes] == wanted
    assert all(n.busy_us > 0 for n in line.nodes) and line.step_us > 0
    assert line.seen_us == pytest.approx(max(n.start_us + n.busy_us for n in line.nodes), rel=0.01)
    assert sum(loss.busy_us for loss in losses(line)) == pytest.approx(sum(n.busy_us for n in line.nodes))
    read = sum(n.bytes for n in line.nodes if n.op.startswith(("linear", "dense_block")))
    assert read >= engine.work["weight_bytes"] * 0.9  # a step reads every weight
    facts = line.facts()
    assert facts["lost_us"] == line.step_us - line.roof_us and len(facts["nodes"]) == len(wanted)
