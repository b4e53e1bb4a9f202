"""`penstock profile` and `penstock run --debug-nodes` on a tiny engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from penstock.bench.timeline import NodeTime, Timeline
from penstock.cli.profile import _statement
from penstock.engine import store
from penstock.engine.program import PLAIN
from penstock.kernels.roof import Roof
from penstock.runtime.batch import Batch
from tests.cpu.cli.test_cli import engine, model, run

__all__ = ["engine", "model", "run"]  # fixtures


def test_profile_shows_every_node_and_what_is_lost(run: Any, engine: Path) -> None:
    ran = run("profile", engine, "--batch", 2, "--context", 20, "--nodes")
    assert ran.code == 0, ran.err
    phases = store.load(engine).programs["decode"].phases
    names = [f"{name}/%{i}" for name in PLAIN for i, n in enumerate(phases[name].graph.nodes) if not n.is_leaf]
    lines = [line.split() for line in ran.out.splitlines()]
    assert [words[1] for words in lines if len(words) > 1 and words[1] in names] == names
    assert "a step of 2 x 1 token behind 20" in ran.out and "lost:" in ran.out and "of the roof" in ran.out
    folded = run("profile", engine, "--prompt-tokens", 5)
    assert "a step of 1 x 5 tokens behind 0" in folded.out and len(folded.out.splitlines()) <= len(ran.out.splitlines())


def test_profile_gives_programs_every_number(run: Any, engine: Path) -> None:
    data = run("profile", engine, "--json", "--batch", 3).data
    assert data["batch"]["rows"] == 3 and data["step_us"] > 0 and data["roof_us"] > 0
    for node in data["nodes"]:
        assert node["busy_us"] > 0 and node["tactic"] and node["bytes"] > 0
    lost = sum(loss["busy_us"] + loss["gap_us"] for loss in data["losses"])
    assert lost == pytest.approx(data["seen_us"]) == sum(n["busy_us"] + n["gap_us"] for n in data["nodes"])


def test_run_dumps_named_values_beside_the_text(run: Any, engine: Path, tmp_path: Path) -> None:
    args = ("run", "--engine_dir", engine, "--input_text", "a b c", "--max_output_len", 4, "--temperature", 0)
    plain, file = run(*args), tmp_path / "nodes.safetensors"
    ran = run(*args, "--debug-nodes", "logits,sampled", "--debug-output", file, "--debug-steps", 2, "--json")
    assert ran.code == 0 and plain.code == 0
    tensors = load_file(file)
    assert sorted(name.split("/")[0] for name in tensors) == ["step0", "step0", "step1", "step1"]
    logits = {name: x for name, x in tensors.items() if x.is_floating_point()}
    assert [x.argmax(-1).tolist() for _, x in sorted(logits.items())] == [[t] for t in ran.data[0]["token_ids"][:2]]
    assert ran.data[0]["text"] in plain.out
    assert all(name in ran.err for name in tensors) and "[4 values written to" in ran.err
    header, *rows = [line.split() for line in ran.err.splitlines() if line.startswith("  ")]
    assert header[-2:] == ["NaN", "inf"] and all(row[-2:] == ["0", "0"] for row in rows)
    assert "[4 tokens generated for 1 text]" in plain.err


def test_dumping_needs_names_and_a_place(run: Any, engine: Path, tmp_path: Path) -> None:
    args = ("run", "--engine_dir", engine, "--input_text", "a")
    for flag, value in (("--debug_output", tmp_path / "x"), ("--debug_steps", 2)):
        ran = run(*args, flag, value)
        assert ran.code == 2 and f"{flag} '{value}'" in ran.err and "give --debug_nodes" in ran.err
    ran = run(*args, "--debug_nodes", "logits", "--debug_output", tmp_path / "deep" / "x")
    assert ran.code == 2 and f"there is no directory {tmp_path / 'deep'}" in ran.err and not ran.out
    assert not list(tmp_path.iterdir())


def test_profile_names_the_flag_and_the_limit(run: Any, engine: Path) -> None:
    most = store.load(engine).profile.max_batch_size
    ran = run("profile", engine, "--batch", most + 1)
    assert ran.code == 2 and f"--batch {most + 1} is outside 1 to {most}" in ran.err
    assert f"max_batch_size={most}" in ran.err and "higher --max_batch_size" in ran.err
    assert "higher" not in run("profile", engine, "--batch", 0).err


def test_looking_never_makes_a_step_shorter() -> None:
    """Where the nodes took less than the step with nobody looking, that is said to be noise."""
    node = NodeTime("forward", "%6", "linear", "linear", "cublas", 1, 0.0, 50.0, 0.0, 0.0, 8.0, 8.0, 1.0)
    said = [
        _statement(Timeline(Batch(), "any", (node,), step, "a clock", "", Roof(1.0, 1.0))) for step in (40.0, 583.0)
    ]
    assert said[0].endswith("looked at, the step took 50.0 us, 10.0 us more")
    assert said[1].endswith("533.0 us less: the noise between two measurements")


def test_a_runs_limits_may_be_lower_than_the_engines(run: Any, engine: Path) -> None:
    ran = run("run", "--engine_dir", engine, "--input_text", "a b c", "--max_seq_len", 16, "--max_output_len", 4)
    assert ran.code == 0
    ran = run("run", "--engine_dir", engine, "--input_text", "a b c " * 20, "--max_seq_len", 16)
    assert ran.code == 2 and "16" in ran.err
