"""The fused graph of each family, printed. To change it on purpose: `pytest tests/golden --update-golden`."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.compiler import pipeline
from penstock.compiler.lower import lower
from penstock.ir.text import graph_from_json, graph_to_json, parse_graph, print_graph
from tests.golden.specs import GOLDEN, forward

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("family", GOLDEN)
def test_fused_graph(family: str, update_golden: bool) -> None:
    graph, _ = pipeline.run(forward(GOLDEN[family]))
    path, text = FOLDER / f"{family}.txt", print_graph(graph)
    if update_golden:
        path.write_text(text)
    assert path.read_text() == text, f"{path.name} differs; if that is meant, run pytest with --update-golden"


def test_no_golden_file_is_left_over() -> None:
    assert {p.stem for p in FOLDER.glob("*.txt")} == set(GOLDEN)


@pytest.mark.parametrize("family", GOLDEN)
def test_print_parse_print(family: str) -> None:
    built = forward(GOLDEN[family])
    fused, _ = pipeline.run(built)
    for graph in (built, fused, lower(fused).graph, *lower(fused).weights.values()):
        text = print_graph(graph)
        again = parse_graph(text)
        assert print_graph(again) == text
        assert again.key() == graph.key()
        assert print_graph(graph_from_json(graph_to_json(graph))) == text
