"""docs/support.md is what the registry, the tests and their records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.models.registry import families_known
from tools import support_matrix
from tools.support_matrix import COMPILED, PAGE, SLOW, TESTED, Cell, page, records

LOG = """
=================================== FAILURES ===================================
----------------------------- Captured stdout call -----------------------------
gemma bfloat16 decoded: 0.50000 nat apart, at most 3.00000; 50.0 % close
==================================== PASSES ====================================
________________ test_the_gpu_decodes_and_scores_as_the_cpu[llama] _____________
----------------------------- Captured stdout call -----------------------------
llama bfloat16 decoded: 0.00123 nat apart, at most 0.01000; 100.0 % close
llama bfloat16 scored: 0.00234 nat apart, at most 0.02000; 100.0 % close
"""


def test_the_page_is_in_step() -> None:
    assert PAGE.read_text("utf-8") == page(), "run python -m tools.support_matrix"


def test_what_passed_on_a_gpu_is_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(records(LOG, "NVIDIA H200", "abc"))
    assert [(r["model"], r["format"]) for r in found] == [("llama", "bf16")]
    kept = tmp_path / "families.jsonl"
    kept.write_text("".join(json.dumps(r) + "\n" for r in found))
    monkeypatch.setattr(support_matrix, "RECORDS", kept)
    support_matrix._recorded.cache_clear()
    llama, gemma = (next(f for f in families_known() if f.name == name) for name in ("llama", "gemma"))
    try:
        assert support_matrix._on_gpu(llama, "bf16", "sm_90") == Cell(TESTED)
        for family, form, generation in ((llama, "f32", "sm_90"), (llama, "bf16", "sm_80"), (gemma, "bf16", "sm_90")):
            assert support_matrix._on_gpu(family, form, generation) == Cell(COMPILED)
    finally:
        support_matrix._recorded.cache_clear()


def test_an_operation_without_a_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support_matrix, "_on_the_reference", lambda site, sizes, device: site.op == "rms_norm")
    slow = support_matrix._of_model.__wrapped__("Llama-3.1-8B", "f32", "sm_100")
    assert slow == Cell(SLOW, "on the reference: rms_norm")
