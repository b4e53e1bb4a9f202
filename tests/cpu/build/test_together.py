"""Threads of one process that want the engine of one model at once."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, SamplingParams
from penstock.compiler import build as build_module
from penstock.engine import store

COUNT = 3


def test_threads_that_build_one_model_all_get_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, write = threading.Barrier(COUNT, timeout=20), build_module.write_engine

    def writing(*args: Any) -> None:
        together.wait()  # none has found another's
        write(*args)

    def text(_: int) -> str:
        with LLM(tiny_model, device="cpu", cache_dir=tmp_path, max_batch_size=4, max_num_tokens=24) as llm:
            return llm.generate("In", SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].text

    monkeypatch.setattr(build_module, "write_engine", writing)
    with ThreadPoolExecutor(COUNT) as pool:
        assert len(set(pool.map(text, range(COUNT)))) == 1
    assert len(list((tmp_path / "engines").iterdir())) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_an_engine_that_another_made_meanwhile_stays_unless_it_is_damaged(
    tiny_engine: Path, tmp_path: Path, damaged: bool
) -> None:
    """Whoever made it may have opened it already."""
    target = tmp_path / "engine"
    with store.writing(target, ours=True) as part:
        shutil.copytree(tiny_engine, part, dirs_exist_ok=True)
        shutil.copytree(tiny_engine, target)
        if damaged:
            (target / store.TIMING).unlink()
        other = target.stat().st_ino
    assert (target.stat().st_ino != other) == damaged
    store.load(target)
