"""The convolution and the scan by slot, interpreted against the references, and compiled with no GPU at hand."""

from __future__ import annotations

import pytest

from penstock.engine.device import CPU, H200
from penstock.kernels.registry import tactics
from tests.kernels.cases.recurrent import CASES, conv, delta, scan, sizes
from tests.kernels.resources import compile_problems
from tests.kernels.subprocess_cases import failures


def test_agree_with_the_references() -> None:
    assert failures("tests.kernels.cases.recurrent") == []


@pytest.mark.long  # minutes of compiling
def test_compiles_without_spills() -> None:
    published = [(conv("bf16", 10240), sizes(64, 64)), (scan("bf16", 128, 64, 128, 8), sizes(2048, 4))]
    published += [(delta("bf16", 32, 16, 128, 128), sizes(n, n)) for n in (1, 64)]
    assert compile_problems([*CASES, *published]) == []


def test_who_cannot() -> None:
    (by_slot,), (by_token,) = tactics("causal_conv"), tactics("selective_scan")
    assert "needs a CUDA device" in str(by_slot.supports(conv("bf16", 8), sizes(1, 1), CPU))
    assert "5000 sequences; at most 4096" in str(by_token.supports(scan("bf16", 2, 4, 8, 1), sizes(5000, 5000), H200))
    assert "17 inputs of a channel" in str(by_slot.supports(conv("bf16", 8, 17), sizes(1, 1), H200))
