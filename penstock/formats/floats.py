"""IEEE float32, IEEE float16 and bfloat16."""

from __future__ import annotations

from penstock.formats.base import Format, register

F32 = register(Format("f32", 32, "float32", "fp32", "F32", True))
F16 = register(Format("f16", 16, "float16", "fp16", "F16", True))
BF16 = register(Format("bf16", 16, "bfloat16", "bf16", "BF16", True))
FLOATS = (F32, F16, BF16)  # what weights are stored in and steps compute in
