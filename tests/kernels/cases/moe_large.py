"""Mixtures of experts too large to interpret: the sums go over several tiles, experts have several, real counts."""

from __future__ import annotations

from penstock.engine.program import Site, Sizes
from tests.kernels.cases.moe import CLAMPED, agree, examples, moe

__all__ = ["CASES", "agree", "examples"]
CASES: list[tuple[Site, Sizes]] = [
    (moe("bf16", 8, 2, 4096, 1792), {"T": 1}),
    (moe("bf16", 8, 2, 1024, 14336), {"T": 3}),
    (moe("bf16", 128, 8, 2048, 768), {"T": 1}),
    (moe("bf16", 128, 8, 2048, 768), {"T": 16}),
    (moe("bf16", 60, 4, 2048, 1408), {"T": 8}),
    (moe("f16", 6, 1, 64, 1032, "gelu"), {"T": 3}),
    (moe("f32", 3, 3, 300, 520, "gelu_tanh"), {"T": 5}),
    (moe("bf16", 32, 4, 2880, 2880, **CLAMPED), {"T": 4}),
    (moe("bf16", 32, 4, 720, 360, **CLAMPED), {"T": 200}),
    (moe("bf16", 60, 4, 96, 32, bias=True), {"T": 16}),
    (moe("f16", 16, 2, 136, 72, "gelu_tanh"), {"T": 300}),
    (moe("bf16", 8, 2, 1032, 520), {"T": 64}),
    (moe("bf16", 8, 2, 1024, 512), {"T": 256}),
    (moe("bf16", 3, 2, 200, 264), {"T": 411}),
    (moe("f16", 3, 1, 2056, 136, "gelu"), {"T": 1000}),
    (moe("bf16", 256, 8, 256, 128), {"T": 2048}),
]
