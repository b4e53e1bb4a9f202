"""docs/writing-a-plugin.md says what is so: its file is a plugin, its commands run, its kernel is right."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import plugins
from penstock.compiler import pipeline
from penstock.compiler.candidates import candidates
from penstock.engine.device import CPU, H200
from penstock.ir.graph import tensor
from penstock.ir.op import get
from penstock.kernels import calls, layouts, registry
from tests.cpu.cli.test_readme import ROOT, here
from tests.kernels.cases.small import site, sizes
from tests.kernels.resources import compile_problems
from tests.kernels.subprocess_cases import failures

PAGE = (ROOT / "docs" / "writing-a-plugin.md").read_text("utf-8")
(CODE,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^```\n(penstock.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[0].splitlines()
NAME = "fused_embedding"
CASES = """
from penstock import plugins
plugins.load(["fused_embedding"])
from penstock.ir.graph import tensor
from tests.kernels.cases.small import site, sizes
CASES = [
    (site("embed_rms_norm", tensor("i32", "T"), tensor(f, 71, e), tensor(f, e), eps=1e-5, offset=o), sizes(t))
    for f, e, o, t in [("bf16", 64, 0.0, 5), ("f16", 160, 1.0, 3), ("f32", 4096, 0.0, 1), ("bf16", 1, 0.0, 2)]
]
"""
SAME = """
import sys
from penstock import LLM, SamplingParams
with LLM(plugins=sys.argv[1:], device="cpu", max_batch_size=2, max_num_tokens=32) as llm:
    outputs = llm.generate(["In the beginning", "def"], SamplingParams(temperature=0, max_tokens=24))
print([output.outputs[0].token_ids for output in outputs])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / f"{NAME}.py").write_text(CODE)
    (folder / "cases.py").write_text(CASES)
    return folder


@pytest.fixture
def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(folder))
    plugins.load([NAME])
    yield
    plugins.unload(NAME)


def run(folder: Path, *words: str) -> str:
    environment = {**here(folder), "PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_commands_run(folder: Path) -> None:
    verb = "import sys; from penstock.cli import main; sys.exit(main())"
    said = [run(folder, "-c", verb, *shlex.split(line)[1:]) for line in COMMANDS]
    assert len(said) == 3 and "fuse_embedding 1x" in said[1] and "pass fuse_embedding" in said[1]
    assert re.search(r"embed_rms_norm\(.*\(plugin fused_embedding\)", said[1])
    assert "Output [Text 0" in said[2]
    engine = json.loads((folder / "ENGINE" / "engine.json").read_text())
    assert engine["plugins"][NAME]["parts"] == {"op": ["embed_rms_norm"], "pass": ["fuse_embedding"]}
    unnamed = [sys.executable, "-c", verb, *shlex.split(COMMANDS[2].replace(f"--plugin {NAME} ", ""))[1:]]
    done = subprocess.run(unnamed, cwd=folder, env=here(folder), capture_output=True, text=True)
    assert done.returncode == 2 and f"needs plugin {NAME}" in done.stderr and f"--plugin {NAME}" in done.stderr


def test_the_text_is_the_same(folder: Path) -> None:
    assert run(folder, "-c", SAME) == run(folder, "-c", SAME, NAME) != "[]\n"


@pytest.mark.usefixtures("loaded")
def test_its_kernel_competes_on_a_gpu_and_its_parts_on_a_cpu() -> None:
    found = site("embed_rms_norm", tensor("i32", "T"), tensor("bf16", 71, 64), tensor("bf16", 64), eps=1e-5)
    for device, names in ((H200, {"row", "parts"}), (CPU, {"parts", "reference"})):
        assert {c.tactic_name for c in candidates(found, sizes(4), device, {})[0]} == names
    assert candidates(found, sizes(4), CPU, {})[1] == {"row": "needs a CUDA device"}
    wide = site("embed_rms_norm", tensor("i32", "T"), tensor("bf16", 71, 16392), tensor("bf16", 16392), eps=1e-5)
    assert "rows of 16392 numbers" in candidates(wide, sizes(4), H200, {})[1]["row"]


@pytest.mark.usefixtures("loaded")
def test_its_kernel_compiles() -> None:
    kinds = [("bf16", 4096), ("f16", 16384), ("f32", 160)]
    cases = [
        (site("embed_rms_norm", tensor("i32", "T"), tensor(f, 71, e), tensor(f, e), eps=1e-5), sizes(4))
        for f, e in kinds
    ]
    assert compile_problems(cases) == []


def test_its_kernel_agrees_with_the_reference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    assert failures("cases") == []


def test_what_it_says_can_be_registered_can() -> None:
    table = PAGE[PAGE.index("## What can be registered") : PAGE.index("A registered float format")]
    named = re.findall(r"`@?(penstock(?:\.\w+)+)", table)
    assert len(named) == 9
    for name in named:
        module, _, function = name.rpartition(".")
        assert callable(getattr(sys.modules.get(module) or __import__(module, fromlist=[function]), function)), name
    assert pipeline.register and registry.register and layouts.register and calls.register and get("add")
