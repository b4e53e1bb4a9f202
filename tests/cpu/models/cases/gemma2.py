"""Gemma 2 and 3: caps, windows between full layers, two ropes."""

from __future__ import annotations

from typing import Any

_TIED = {"head_dim": 16, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
_LINEAR = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }
}

_TEXT = {
    "vocab_size": 99, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "sliding_window": 9,
    "sliding_window_pattern": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {**_TIED, "sliding_window": 9, "query_pre_attn_scalar": 24, "num_hidden_layers": 3}),
    "gemma2-caps": (
        "gemma2",
        {**_TIED, "sliding_window": 200, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "gemma2-uncapped-untied-biases": (
        "gemma2",
        {"head_dim": 12, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "gemma2-types": (
        "gemma2",
        {
            **_TIED, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"],
            "num_key_value_heads": 1,
        },
    ),
    "gemma3": ("gemma3_text", {**_TIED, "sliding_window": 9, "query_pre_attn_scalar": 20, "num_hidden_layers": 7}),
    "gemma3-linear": ("gemma3_text", {**_TIED, **_LINEAR, "sliding_window": 11, "sliding_window_pattern": 2}),
    "gemma3-capped-types": (
        "gemma3_text",
        {
            **_TIED, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"],
            "final_logit_softcapping": 2.0, "attention_bias": True, "num_key_value_heads": 1,
        },
    ),
    "gemma3-with-eyes": (
        "gemma3",
        {"tie_word_embeddings": True, "text_config": _TEXT, "vision_config": _VISION, "mm_tokens_per_image": 4},
    ),
}  # fmt: skip
