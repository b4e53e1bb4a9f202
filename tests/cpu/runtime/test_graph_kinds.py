"""Which captured graph a step takes: its own bucket's, without what single tokens do without, or the next larger."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.engine import memory, store
from penstock.engine.memory import Key, bucket_keys, single_keys
from penstock.runtime.graphs import Graphs
from tests.cpu.cli.test_inspect_gpu import engine as engine_dir

__all__ = ["engine_dir"]  # a fixture: an engine of the tiny model for an H200


class Named(Graphs):
    """Captures by name alone."""

    def capture(self, key: Key, singles: bool = False) -> None:
        (self.singles if singles else self.captured)[key] = (key, singles)  # type: ignore[assignment]

    def bind(self, key: Key, singles: bool = False) -> Any:
        return key, singles


@pytest.fixture
def graphs(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Graphs:
    from penstock.runtime import graphs as module

    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=SimpleNamespace(graph_pool_handle=lambda: 0)))
    return Named(store.load(engine_dir), None, None)  # type: ignore[arg-type]


def test_single_tokens_take_the_graph_without_what_they_need_not(graphs: Graphs) -> None:
    graphs.capture_sparse()
    while graphs.capture_next():
        pass
    assert graphs.done == graphs.count == len(bucket_keys(graphs.engine.profile)) + len(graphs.singles)
    (most, *_) = sorted(graphs.singles, reverse=True)
    assert graphs.find(most[0], most[0], most[1]) == (most, True)
    assert graphs.find(most[0], most[0] - 1, most[1]) == (most, False)  # some row is longer
    assert graphs.find(1, 1, 1) == ((1, 1), False)  # nothing could be left out
    assert graphs.larger == 0
    assert graphs.exact(most[0], most[0], most[1])[0] == (most, True)


def test_what_is_not_captured_yet_takes_the_next_larger(graphs: Graphs) -> None:
    low, high = sorted(single_keys(graphs.engine))[0], sorted(bucket_keys(graphs.engine.profile))[-1]
    graphs.capture(high)
    assert graphs.find(low[0], low[0], low[1]) == (high, False) and graphs.larger == 1
    graphs.capture(low)
    assert graphs.find(low[0], low[0], low[1]) == (low, False) and graphs.larger == 1
    assert graphs.exact(low[0], low[0], low[1]) == ((low, True), (low, True))
    assert graphs.find(low[0], low[0], low[1]) == (low, True)


def test_the_memory_plan_counts_every_graph(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(memory, "graph_bytes", lambda count, *_: counted.append(count) or 0)
    assert memory.plan_run(graphs.engine, 1 << 40).graphs == 0
    assert memory.single_keys(graphs.engine) and counted == [graphs.count]
