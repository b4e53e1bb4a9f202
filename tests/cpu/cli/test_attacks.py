"""Input made to break the command line: one line and an exit code, whatever it is."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from penstock.cli import main, run_engine
from penstock.cli.app import app, split_debug
from penstock.cli.console import result
from penstock.compiler.candidates import check_pins
from penstock.errors import OptionError, SelectionError, TokenizerError, UnsupportedError
from penstock.runtime import ModelRunner
from penstock.text import ChatTemplate

LIMITS = ["--max_batch_size", "4", "--max_num_tokens", "24", "--device", "cpu"]

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def one(*args: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(a) for a in args])
        return code, capsys.readouterr().err

    return one


def failed(ran: tuple[int, str]) -> tuple[int, str]:
    """The code, and the one line that says why."""
    code, err = ran
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return code, lines[0]


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        ({"nonsense": "x"}, r"unknown op 'nonsense'; known are .*linear"),
        ({"random": "reference"}, "unknown op 'random'"),  # computed once, when weights are written
        ({"add": "!magic"}, "no tactic 'magic' for op 'add'"),
        ({"linear": 3}, "'linear' is 3, a int"),
    ],
)
def test_pins_that_can_pin_nothing(pins: Any, said: str) -> None:
    with pytest.raises(SelectionError, match=said):
        check_pins(pins)
    check_pins({"linear": "!reference", "add": "reference"})


def test_an_unknown_op_is_refused_before_anything_is_timed(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    ran = run("build", "--checkpoint_dir", tiny_model, "--tactic", "foo=bar", "--cache_dir", tmp_path, *LIMITS)
    code, line = failed(ran)
    assert code == 2 and "'foo'" in line and "linear" in line and "select:" not in ran[1]
    assert not list(tmp_path.rglob("*.json"))


def test_a_pin_that_this_device_cannot_run_says_why(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    words = ("--tactic", "linear=cublas", "--device", "cpu", "--cache_dir", tmp_path, *LIMITS)
    code, line = failed(run("build", "--checkpoint_dir", tiny_model, *words))
    assert code == 2 and "'cublas', pinned for op 'linear', cannot run" in line and "needs a CUDA device" in line
    assert "{" not in line and "leave the choice" in line


def test_a_gpus_limit_is_refused_on_a_cpu(run: Run, tiny_model: Path, tiny_engine: Path, tmp_path: Path) -> None:
    ran = run("generate", tiny_model, "-p", "a", "--device", "cpu", "--max_gpu_bytes", 5, "--cache_dir", tmp_path)
    code, line = failed(ran)
    assert code == 2 and "max_gpu_bytes=5" in line and "leave it out" in line and not list(tmp_path.iterdir())
    with pytest.raises(OptionError, match="max_gpu_bytes=5"):
        ModelRunner.from_dir(tiny_engine, max_gpu_bytes=5)


@pytest.mark.parametrize(
    ("words", "kept", "debug"),
    [
        ("--debug inspect x", "inspect x", True),
        ("inspect x --debug", "inspect x", True),
        ("generate -p --debug", "generate -p --debug", False),
        ("generate --debug -p --debug", "generate -p --debug", True),
        ("generate --max-tokens --debug", "generate --max-tokens --debug", False),
        ("generate --max_tokens 3 --debug", "generate --max_tokens 3", True),
        ("generate --json --debug", "generate --json", True),
        ("generate -p -p --debug", "generate -p -p", True),
        ("generate -- --debug", "generate -- --debug", False),
        ("serve x --debug", "serve x", True),
        ("--debug", "", True),
    ],
)
def test_debug_is_no_word_of_a_prompt(words: str, kept: str, debug: bool) -> None:
    assert split_debug(get_command(app), words.split()) == (kept.split(), debug)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["build", "--plugin", ""], "--plugin ''"),
        (["build", "--plugin", ".x"], "--plugin '.x'"),
        (["check", "--memory_gb", "inf", "--device", "cpu"], "--memory_gb inf"),
        (["check", "--memory_gb", "1e300", "--device", "cpu"], "--memory_gb 1e+300"),
        (["check", "--memory_gb", "nan", "--device", "cpu"], "--memory_gb nan"),
        (["build", "--checkpoint_dir", "{model}", "--max_input_len", "500", "--device", "cpu"], "max_seq_len 256"),
        (["build", "--checkpoint_dir", "{model}", "--max_batch_size", "1000000000", "--max_num_tokens", "1000000000",
          "--device", "cpu"], "lower max_batch_size"),
        (["build", "--checkpoint_dir", "{model}", "--max_seq_len", "1", "--device", "cpu"], "max_seq_len=1"),
    ],
)  # fmt: skip
def test_values_out_of_range(run: Run, tiny_model: Path, words: list[str], said: str) -> None:
    code, line = failed(run(*(word.replace("{model}", str(tiny_model)) for word in words)))
    assert code == 2 and said in line


def test_an_interrupt_says_so(run: Run, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock.cli.inspect_report.report", interrupted)
    assert run("inspect", tiny_engine) == (130, "interrupted\n")


def test_what_the_system_refuses_is_one_line(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "file"
    taken.write_text("here already")
    code, line = failed(run("build", "--checkpoint_dir", tiny_model, "--cache_dir", taken / "cache", *LIMITS))
    assert code == 1 and str(taken) in line
    monkeypatch.setattr("penstock.models.hub.resolve", _refuse)
    code, line = failed(run("build", "--checkpoint_dir", tiny_model, *LIMITS))
    assert code == 1 and "Read-only" in line
    with pytest.raises(OSError, match="Read-only"):
        main(["build", "--checkpoint_dir", str(tiny_model), "--debug"])


def _refuse(_: object) -> Path:
    raise OSError(30, "Read-only file system")


def test_no_home_is_one_line(run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    code, line = failed(run("build", "--checkpoint_dir", tiny_model, *LIMITS))
    assert code == 1 and "HOME" in line


def test_a_stream_that_cannot_show_a_character_gets_its_escape(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    result("a\udce9b")
    assert capsysbinary.readouterr().out == b"a\\udce9b\n"


def write(model: Path, target: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(model, target)
    path = target / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    return target


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        *(("config.json", "eos_token_id", value) for value in ("a", 1.5, [1, None], True, -1, 300, {"a": 1})),
        ("generation_config.json", "eos_token_id", [1, "b"]),
        ("generation_config.json", "max_new_tokens", 0),
        ("generation_config.json", "max_new_tokens", 2.0),
        ("generation_config.json", "do_sample", "no"),
        ("generation_config.json", "temperature", -1),
        ("generation_config.json", "temperature", 1e-7),
        ("generation_config.json", "top_p", 0),
        ("generation_config.json", "top_k", 2**31),
    ],
)
def test_generation_settings_are_checked_by_the_build(
    run: Run, tiny_model: Path, tmp_path: Path, file: str, key: str, value: Any
) -> None:
    model = write(tiny_model, tmp_path / "model", file, **{key: value})
    code, line = failed(run("build", "--checkpoint_dir", model, "--cache_dir", tmp_path, *LIMITS))
    assert code == 1 and f"{file}: {key} = {value!r}" in line


def test_good_generation_settings_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    from penstock.text.generation import generation_facts

    changes = {"eos_token_id": [1, 299], "temperature": 0, "top_k": -1, "top_p": None, "max_new_tokens": 5}
    model = write(tiny_model, tmp_path / "model", "generation_config.json", **changes)
    facts = generation_facts(model)
    assert facts["eos"] == [1, 299] and facts["generation"]["max_new_tokens"] == 5
    (model / "generation_config.json").unlink()
    assert generation_facts(model) == {"eos": [1], "generation": {}}


def test_a_loop_of_millions_is_refused_in_about_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its steps where the machine is quick, by the clock where it is not; each alone suffices."""
    template = ChatTemplate("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}")
    messages = [{"role": "user", "content": "x"}]
    begin = time.monotonic()
    with pytest.raises(TokenizerError, match=r"loop turns|seconds"):
        template.render(messages)
    assert time.monotonic() - begin < 4
    monkeypatch.setattr("penstock.text.limits.MAX_SECONDS", 60.0)
    with pytest.raises(TokenizerError, match="more than 2000000 loop turns"):
        template.render(messages)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "WORLD_SIZE"])
def test_more_ranks_than_are_built_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """`mpirun -n 8 penstock run` would start eight whole models side by side."""
    monkeypatch.setenv(name, "8")
    with pytest.raises(UnsupportedError, match="tp_size=8 is not built yet"):
        run_engine.run(tmp_path, ["x"])
