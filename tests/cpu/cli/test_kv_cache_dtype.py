"""--kv_cache_dtype from the command line: a build of its own, and what every verb says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.cli import main

LIMITS = ["--max_batch_size", "2", "--max_num_tokens", "24", "--device", "cpu"]
FP8 = ["--kv_cache_dtype", "fp8"]


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def data(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    code, out, err = told(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_every_verb_says_what_kv_is_kept_in(capsys: pytest.CaptureFixture[str], tiny_model: Path, cache: Path) -> None:
    narrow = data(capsys, "build", "--checkpoint_dir", tiny_model, *LIMITS, *FP8, "--cache_dir", cache)["engine"]
    plain = data(capsys, "build", "--checkpoint_dir", tiny_model, *LIMITS, "--cache_dir", cache)["engine"]
    assert narrow != plain
    seen, other = data(capsys, "inspect", narrow), data(capsys, "inspect", plain)
    assert (seen["format"], seen["kv_format"], other["kv_format"]) == ("f32", "fp8_e4m3", "f32")
    assert 4 * seen["memory"]["kv_per_token"] == other["memory"]["kv_per_token"]
    assert "f32, KV fp8_e4m3" in told(capsys, "inspect", narrow)[1]
    for subject in (tiny_model, narrow):
        found = data(capsys, "check", subject, *LIMITS, *FP8)
        assert found["kv_format"] == "fp8_e4m3"
        assert found["memory"]["kv_per_token"] == seen["memory"]["kv_per_token"]
        assert "f32, KV fp8_e4m3 on" in told(capsys, "check", subject, *LIMITS, *FP8)[1]
    kept = ["generate", "-p", "A tuple", "--max_tokens", 4, "--temperature", 0, *LIMITS, "--cache_dir", cache]
    assert data(capsys, *kept, narrow)["token_ids"] == data(capsys, *kept, *FP8, tiny_model)["token_ids"]


def test_what_contradicts_is_refused(capsys: pytest.CaptureFixture[str], tiny_model: Path, tiny_engine: Path) -> None:
    for subject, asked, named in (
        (tiny_model, "int4", "is not one of auto, fp8"),
        (tiny_model, "bfloat16", "the model computes in f32"),
        (tiny_engine, "fp8", "keeps KV in f32"),
    ):
        code, out, err = told(capsys, "check", subject, "--device", "cpu", "--kv_cache_dtype", asked)
        assert (code, out) == (2, "") and named in err
