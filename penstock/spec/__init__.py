"""What a model is, as small frozen records; and the rotary frequencies that follow from them."""

from __future__ import annotations

from penstock.spec.model import (
    Attention,
    DynamicNtk,
    LayerSpec,
    Linear,
    Llama3,
    LongRope,
    Mlp,
    ModelSpec,
    Norm,
    Rope,
    Scaling,
    Yarn,
)
from penstock.spec.rope import attention_factor, inverse_frequencies

__all__ = [
    "Attention",
    "DynamicNtk",
    "LayerSpec",
    "Linear",
    "Llama3",
    "LongRope",
    "Mlp",
    "ModelSpec",
    "Norm",
    "Rope",
    "Scaling",
    "Yarn",
    "attention_factor",
    "inverse_frequencies",
]
