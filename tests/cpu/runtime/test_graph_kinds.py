"""Which captured graph a step takes: its own bucket's, without what single tokens do without, or the next larger."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.engine import memory, store
from penstock.engine.memory import Key, bucket_keys, single_keys
from penstock.engine.program import PLAIN
from penstock.runtime.graphs import Graphs, Kind
from tests.cpu.cli.test_inspect_gpu import engine as engine_dir

__all__ = ["engine_dir"]  # a fixture: an engine of the tiny model for an H200


class Named(Graphs):
    """Captures by name alone."""

    def capture(self, key: Key, kind: Kind) -> None:
        for each in (Kind.FRONT, Kind.TAIL) if kind is Kind.FRONT else (kind,):
            self._captured[key, each] = (key, each)  # type: ignore[assignment]

    def bind(self, key: Key, singles: bool = False, phases: Any = PLAIN) -> Any:
        return key, Kind.SINGLES if singles else Kind.WHOLE


@pytest.fixture
def graphs(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Graphs:
    from penstock.runtime import graphs as module

    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=SimpleNamespace(graph_pool_handle=lambda: 0)))
    return Named(store.load(engine_dir), None, None)  # type: ignore[arg-type]


def test_single_tokens_take_the_graph_without_what_they_need_not(graphs: Graphs) -> None:
    graphs.capture_sparse()
    while graphs.capture_next():
        pass
    singles = single_keys(graphs.engine)
    assert graphs.done == graphs.count == len(bucket_keys(graphs.engine.profile)) + len(singles)
    (most, *_) = sorted(singles, reverse=True)
    assert graphs.find(most[0], most[0], most[1]) == (most, Kind.SINGLES)
    assert graphs.find(most[0], most[0] - 1, most[1]) == (most, Kind.WHOLE)  # some row is longer
    assert graphs.find(1, 1, 1) == ((1, 1), Kind.WHOLE)  # nothing could be left out
    assert graphs.larger == 0
    assert graphs.exact(most[0], most[0], most[1])[0] == (most, Kind.SINGLES)


def test_what_is_not_captured_yet_takes_the_next_larger(graphs: Graphs) -> None:
    low, high = sorted(single_keys(graphs.engine))[0], sorted(bucket_keys(graphs.engine.profile))[-1]
    graphs.capture(high, Kind.WHOLE)
    assert graphs.find(low[0], low[0], low[1]) == (high, Kind.WHOLE) and graphs.larger == 1
    graphs.capture(low, Kind.WHOLE)
    assert graphs.find(low[0], low[0], low[1]) == (low, Kind.WHOLE) and graphs.larger == 1
    assert graphs.exact(low[0], low[0], low[1]) == ((low, Kind.SINGLES), (low, Kind.SINGLES))
    assert graphs.find(low[0], low[0], low[1]) == (low, Kind.SINGLES)


def test_the_parts_of_a_controlled_step_are_captured_when_the_first_one_comes(graphs: Graphs) -> None:
    graphs.capture_sparse()
    whole = graphs.done
    key = graphs.engine.profile.bucket(3, 1)
    for _ in range(2):
        assert graphs.parts(3, 1) == ((key, Kind.FRONT), (key, Kind.TAIL)) and graphs.late == 1
    assert graphs.done == whole + 1 and graphs.find(3, 1, 1)[1] is Kind.WHOLE  # type: ignore[index]
    smaller = graphs.engine.profile.bucket(1, 1)
    assert graphs.parts(1, 1)[0] == (key, Kind.FRONT) and (graphs.late, graphs.larger) == (1, 1) and smaller != key
    assert graphs.parts(200, 1)[0][0] == graphs.engine.profile.bucket(200, 1) and graphs.late == 2  # type: ignore[index]
    while graphs.capture_next():
        pass
    assert graphs.done == graphs.count == len(single_keys(graphs.engine)) + 2 * len(bucket_keys(graphs.engine.profile))
    assert graphs.parts(1, 1)[0] == (smaller, Kind.FRONT) and graphs.late == 2


def test_the_memory_plan_counts_every_graph(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(memory, "graph_bytes", lambda count, *_: counted.append(count) or 0)
    assert memory.plan_run(graphs.engine, 1 << 40).graphs == 0
    wholes = len(bucket_keys(graphs.engine.profile))  # each of which may be captured in two parts as well
    assert memory.single_keys(graphs.engine) and counted == [graphs.count + 2 * wholes]
