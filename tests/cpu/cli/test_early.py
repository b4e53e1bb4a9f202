"""What the verbs that open an engine refuse before they read its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli import main


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The error line of a call that was wrong."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return next(line for line in said.splitlines() if line.startswith("error: "))


SAMPLING = [
    ("--top_k", "9999999999"), ("--top_k", "-2"), ("--temperature", "nan"), ("--temperature", "-1"),
    ("--temperature", "inf"), ("--temperature", "1e-9"), ("--top_p", "5"), ("--top_p", "0"), ("--top_p", "nan"),
]  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), SAMPLING)
def test_profile_and_run_refuse_the_same_sampling(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    of_profile = refused(capsys, "profile", tiny_engine, flag, value)
    of_run = refused(capsys, "run", "--engine_dir", tiny_engine, "--input_text", "x", flag, value)
    assert of_profile == of_run and flag.removeprefix("--") in of_profile


def test_profile_samples_where_it_is_told_to(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(tiny_engine), "--temperature", "1", "--top_k", "-1", "--top_p", "0.5"]) == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--debug_nodes", "logitz"], "'logitz'"),
        (["--debug_nodes", "logits", "--debug_steps", "0"], "at least 1"),
        (["--debug_nodes", "logits", "--debug_steps", "-3"], "at least 1"),
    ],
)
def test_nodes_to_dump_are_checked_before_weights_are_read(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], named: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("opened the model")

    monkeypatch.setattr("penstock.cli.run_engine.open_llm", never)
    assert named in refused(capsys, "run", "--engine_dir", tiny_engine, "--input_text", "x", *words)
