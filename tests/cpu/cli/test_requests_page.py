"""docs/requests.md says what is so: its samples run, and no parameter or counter is missing."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from penstock import LLM, SamplingParams
from penstock.cli import main
from penstock.runtime.requests import RequestMetrics
from tests.cpu.cli.test_readme import ROOT, here

PAGE = (ROOT / "docs" / "requests.md").read_text("utf-8")
CODE = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^```\n(penstock.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[0].splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("requests")


def test_its_python_prints_what_it_says(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=folder, env=here(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^ *print\(.*\)  # prints (.*)$", CODE, re.MULTILINE)
    assert len(said) == CODE.count("print(") > 9
    assert done.stdout.splitlines() == said + 3 * said[-1:]  # the last is in a loop of four


def test_its_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", here(folder)["XDG_CACHE_HOME"])
    assert len(COMMANDS) == 3
    for line in COMMANDS:
        words = shlex.split(line)
        assert words[0] == "penstock" and main([*words[1:], "--device", "cpu"]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out


def test_every_parameter_and_measure_has_its_words() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert {each.name for each in fields(SamplingParams)} <= named
    measures = {name for name, value in vars(RequestMetrics).items() if isinstance(value, property)}
    assert measures <= named


def test_every_counter_has_its_words(tiny_engine: Path) -> None:
    table = PAGE[PAGE.index("| counters of") : PAGE.index("A request's own times")]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))))
    with LLM(tiny_engine, device="cpu") as llm:
        counted = set(llm.stats())
    source = (ROOT / "penstock" / "runtime" / "cuda.py").read_text("utf-8")
    of_gpu = set(re.findall(r'"(\w+)": ', source[source.index("def counters") : source.index("def close")]))
    assert named == counted | of_gpu
