"""Attention with what belongs to heads beside their keys, and rotation of neighbours."""

from __future__ import annotations

from penstock.engine.program import Site
from penstock.ir.ops.attention import EXTRAS
from tests.kernels.cases.attention import FP8, Sizes, attention, examples, rope, rope_append, rope_attention, sizes

__all__ = ["CASES", "examples"]
SLOPES, DISTANCES, SINKS = (("slopes",), ("distances",), ("sinks",))
CASES: list[tuple[Site, Sizes]] = [
    (attention("bf16", 8, 2, 128, extras=SLOPES), sizes(13, 4, 2)),
    (attention("f16", 3, 3, 80, 32, extras=SLOPES), sizes(21, 3, 5)),
    (attention("f32", 4, 2, 64, extras=SLOPES), sizes(16, 8, 3)),
    (attention("bf16", 4, 4, 64, extras=SLOPES), sizes(48, 6, 16)),
    (attention("bf16", 8, 1, 64, extras=DISTANCES), sizes(13, 4, 2)),
    (attention("f16", 4, 2, 64, extras=DISTANCES), sizes(48, 6, 16)),
    (attention("f32", 3, 1, 80, 16, extras=DISTANCES), sizes(15, 3, 9)),
    (attention("bf16", 16, 2, 64, window=20, extras=SINKS), sizes(13, 4, 2)),
    (attention("f16", 7, 1, 64, 16, extras=SINKS), sizes(44, 5, 64)),
    (attention("f32", 4, 2, 64, extras=SINKS), sizes(16, 8, 3)),
    (attention("bf16", 4, 2, 128, 64, softcap=20.0, extras=EXTRAS), sizes(54, 5, 3)),
    (attention("bf16", 4, 1, 128, pool=FP8, extras=EXTRAS), sizes(48, 6, 16)),
    (attention("f32", 4, 2, 64, pool=FP8, extras=EXTRAS), sizes(16, 8, 3)),
    (attention("bf16", 8, 1, 128, extras=EXTRAS), sizes(1, 1, 8)),
    (rope("bf16", 8, 128, 64, interleaved=True), sizes(5, 2, 2)),
    (rope("f32", 3, 80, 20, "S", scale=1.1, interleaved=True), sizes(6, 3, 2)),
    (rope_append("bf16", 4, 2, 64, 16, norms=True, interleaved=True), sizes(9, 3, 9)),
    (rope_append("f16", 6, 6, 80, 32, half=16, rows="S", interleaved=True, pool=FP8), sizes(7, 7, 5)),
    (rope_append("f32", 2, 2, 16, 16, half=4, interleaved=True), sizes(67, 3, 9)),
    (rope_attention("bf16", 8, 2, 128, half=32, interleaved=True), sizes(13, 4, 2)),
    (rope_attention("f32", 3, 1, 80, 32, half=5, rows="S", norms=True, interleaved=True), sizes(21, 3, 5)),
    (rope_attention("bf16", 16, 2, 64, window=20, extras=SINKS), sizes(13, 4, 2)),
    (rope_attention("bf16", 8, 2, 64, extras=SINKS), sizes(1, 1, 8)),
    (rope_attention("f16", 3, 1, 80, 32, half=16, norms=True, extras=EXTRAS), sizes(21, 3, 5)),
    (rope_attention("bf16", 4, 1, 128, pool=FP8, extras=SINKS), sizes(48, 6, 16)),
    (rope_attention("f32", 4, 2, 64, extras=SINKS), sizes(3, 2, 3)),
]
