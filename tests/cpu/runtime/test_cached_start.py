"""A start with the engine there: nothing that only a build needs is imported, and nothing is built or started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from penstock.bench import start, workload

OPENS = """
import subprocess, sys
import torch  # whose own import asks ldconfig
def started(*command, **_):
    raise AssertionError(f"a process was started: {command}")
subprocess.Popen = started
from penstock import LLM, SamplingParams
with LLM(sys.argv[1], device="cpu", skip_tokenizer_init=True) as llm:
    ids = llm.generate({"prompt_token_ids": [3, 4, 5]}, SamplingParams(max_tokens=1, ignore_eos=True))[0].outputs[0]
assert len(ids.token_ids) == 1
for name in ("triton", "transformers", "huggingface_hub", "requests"):
    assert name not in sys.modules, name
compiler = {name for name in sys.modules if name.startswith("penstock.compiler.")}
assert compiler <= {"penstock.compiler.options", "penstock.compiler.progress"}, compiler
assert not [name for name in sys.modules if name.endswith("_triton")]
"""


def test_opening_an_engine_imports_no_compiler_and_starts_no_process(tiny_engine: Path) -> None:
    subprocess.run([sys.executable, "-c", OPENS, str(tiny_engine)], check=True)


def test_a_first_and_a_cached_start_are_timed_to_their_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    small = workload.TINY | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    monkeypatch.setitem(workload.MODELS, "tiny", small)  # type: ignore[arg-type]  # a dict, read by write_model
    monkeypatch.setattr(start, "prompt", lambda length, seed: [3, 4, 5])
    monkeypatch.setattr(start, "OPTIONS", {**start.OPTIONS, "max_seq_len": 64, "max_num_tokens": 16})
    first, cached = start.start_times("tiny", "cpu", cached=1)
    assert (first.metric, cached.metric) == ("start_first_s", "start_cached_s")
    assert first.value > 0 and cached.value > 0  # which is less says nothing on a busy machine
    assert "select" in first.note and "select" not in cached.note, "a cached start builds nothing"
    assert "first token" in cached.note
