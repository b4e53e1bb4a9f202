"""What a model is, as small frozen records; and the rotary frequencies that follow from them."""

from __future__ import annotations

from penstock.spec.layer import (
    AnyAttention,
    AnyNorm,
    Attention,
    BySlot,
    DeltaNet,
    FeedForward,
    Latent,
    LayerNorm,
    Mixer,
    Mlp,
    Moe,
    Norm,
    Router,
    StateSpace,
)
from penstock.spec.model import EncoderSpec, LayerSpec, ModelSpec
from penstock.spec.position import (
    Alibi,
    DynamicNtk,
    Linear,
    Llama3,
    LongRope,
    RelativeBias,
    Rope,
    Scaling,
    Yarn,
    alibi_slopes,
)
from penstock.spec.rope import attention_factor, inverse_frequencies

__all__ = [
    "Alibi",
    "AnyAttention",
    "AnyNorm",
    "Attention",
    "BySlot",
    "DeltaNet",
    "DynamicNtk",
    "EncoderSpec",
    "FeedForward",
    "Latent",
    "LayerNorm",
    "LayerSpec",
    "Linear",
    "Llama3",
    "LongRope",
    "Mixer",
    "Mlp",
    "ModelSpec",
    "Moe",
    "Norm",
    "RelativeBias",
    "Rope",
    "Router",
    "Scaling",
    "StateSpace",
    "Yarn",
    "alibi_slopes",
    "attention_factor",
    "inverse_frequencies",
]
