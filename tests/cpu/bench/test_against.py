"""Peers: what they are asked, how their processes may fail, the table, and that Hugging Face's loop is its generate."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from penstock.bench import against
from penstock.bench.against import Line
from penstock.bench.peers import hugging_face, vllm_offline
from penstock.bench.peers.task import MARK, Answer, Task, decode_rate, first_tokens, serve
from penstock.errors import OptionError
from tests.cpu import tiny

TASK = Task("eager", "model", "float32", "cpu", (5, 9), 3, 7, 4, 299)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("peer") / "model")


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_names_of_peers() -> None:
    assert against.parse(" vllm,eager,eager") == ("vllm", "eager")
    for wrong in ("eager,fast", ",", ""):
        with pytest.raises(OptionError, match="eager, compile, cudagraph"):
            against.parse(wrong)


def test_a_peers_answer_is_found_among_what_its_libraries_print() -> None:
    line = MARK + json.dumps(asdict(Answer(1.0, 2.0, 3.0, 4.0, "x 1")))
    assert against.ask(TASK, python(f"print('loading'); print({line!r}); print('bye')")) == Answer(
        1.0, 2.0, 3.0, 4.0, "x 1"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('out of memory')", "its process ended with 1: out of memory"),
        ("import os; os.kill(os.getpid(), 9)", "its process ended with -9: no message"),
        ("import time; time.sleep(60)", "nothing after 1 s"),
    ],
)
def test_a_peer_that_fails_is_a_row_with_its_reason(code: str, said: str) -> None:
    assert against.ask(TASK, python(code), patience=1.0).refused == said


def test_an_error_in_a_peer_is_its_answer(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(task: Task) -> Answer:
        assert task == TASK
        raise ValueError("no such thing")

    serve(broken, [json.dumps(asdict(TASK))])
    assert json.loads(capsys.readouterr().out.removeprefix(MARK))["refused"] == "ValueError: no such thing"


def test_a_peer_that_is_not_installed_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert vllm_offline.measure(replace(TASK, way="vllm")).refused == vllm_offline.MISSING
    assert hugging_face.measure(TASK).refused == hugging_face.MISSING


def test_graphs_need_a_gpu() -> None:
    assert "need a GPU" in hugging_face.measure(replace(TASK, way="compile+cudagraph")).refused


def test_the_table_says_how_much_faster_than_eager() -> None:
    found = [
        Line("penstock", Answer(5.0, 6.0, 200.0, 16.0)),
        Line("eager", Answer(20.0, 25.0, 10.0, 17.0, "transformers 5")),
        Line("vllm", Answer(refused="not here")),
    ]
    lines = against.text(found).splitlines()
    assert [cell.strip() for cell in lines[1].split("|")][1:] == ["5.00", "6.00", "200.00", "16.00", "4.00x", "20.00x"]
    assert lines[-1] == "left out: vllm: not here"
    assert against.to_json(found)[2] == {"name": "vllm", "refused": "not here"}


def test_hugging_faces_loop_makes_the_tokens_of_its_generate(model: Path) -> None:
    ids = [5, 9, 200, 31, 7]
    for way in ("eager", "cudagraph"):
        runner = hugging_face.Runner(replace(TASK, way=way, model=str(model)))
        if way == "cudagraph":  # the static cache, without the graphs that need a GPU
            runner.prefill = runner.decode = runner.forward
        want = runner.model.generate(
            torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        with torch.no_grad():
            assert 0 <= runner.first(ids) < 300
            assert runner.generate(ids, 6) == want[0, len(ids) :].tolist()
            assert runner.generate(ids, 6) == want[0, len(ids) :].tolist()  # nothing is left over from before


def test_a_peer_is_measured_by_our_definitions() -> None:
    asked: list[tuple[int, int]] = []
    first_tokens(TASK, lambda ids: asked.append((len(ids), 1)))
    assert asked == [(5, 1)] * 6 + [(9, 1)] * 6  # three that warm up and three that count
    asked.clear()

    def generate(ids: list[int], new: int) -> None:
        asked.append((len(ids), new))
        time.sleep(0.05 * new)

    assert 5 < decode_rate(TASK, generate) < 30  # 20, but for the clock and whoever else computes
    assert asked == [(7, 4), (7, 1), (7, 1), (7, 4)]
    with pytest.raises(OptionError, match="4 new tokens take hardly longer"):
        decode_rate(TASK, lambda ids, new: time.sleep(0.01 / new))


def test_a_rate_that_was_not_measured_is_no_number() -> None:
    found = [Line("penstock", Answer(5.0, 6.0, 0.0, 16.0)), Line("eager", Answer(10.0, 12.0, 10.0, 20.0, "t 5"))]
    own = [cell.strip() for cell in against.text(found).splitlines()[1].split("|")]
    assert own == ["penstock", "5.00", "6.00", "-", "16.00", "2.00x", "-"]
    assert against.to_json(found)[0]["tokens_per_s"] is None


def test_a_whole_peer_process(model: Path) -> None:
    answer = against.ask(replace(TASK, model=str(model), samples=1, new=32))
    assert not answer.refused and answer.version.startswith("transformers ")
    assert answer.ttft_ms > 0 and answer.tokens_per_s > 0 and answer.memory_gb > 0.01
