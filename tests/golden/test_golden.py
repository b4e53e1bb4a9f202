"""The fused graph of each family, printed. To change it on purpose: `pytest tests/golden --update-golden`."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.compiler import pipeline
from penstock.compiler.lower import lower
from penstock.ir.text import graph_from_json, graph_to_json, parse_graph, print_graph
from tests.golden.specs import PROGRAMS

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("program", PROGRAMS)
def test_fused_graph(program: str, update_golden: bool) -> None:
    graph, _ = pipeline.run(PROGRAMS[program]())
    path, text = FOLDER / f"{program}.txt", print_graph(graph)
    if update_golden:
        path.write_text(text)
    assert path.read_text() == text, f"{path.name} differs; if that is meant, run pytest with --update-golden"


def test_no_golden_file_is_left_over() -> None:
    assert {p.stem for p in FOLDER.glob("*.txt")} == set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_print_parse_print(program: str) -> None:
    built = PROGRAMS[program]()
    fused, _ = pipeline.run(built)
    for graph in (built, fused, lower(fused).graph, *lower(fused).weights.values()):
        text = print_graph(graph)
        again = parse_graph(text)
        assert print_graph(again) == text
        assert again.key() == graph.key()
        assert print_graph(graph_from_json(graph_to_json(graph))) == text
