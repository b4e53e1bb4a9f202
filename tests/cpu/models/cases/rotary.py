"""Phi-3, OLMo 2, Granite, Command-R and GLM-4."""

from __future__ import annotations

from typing import Any


def _longrope(count: int, original: int, **more: Any) -> dict[str, Any]:
    lists = {"short_factor": [1.0 + i / 9 for i in range(count)], "long_factor": [1.0 + i for i in range(count)]}
    return {"original_max_position_embeddings": original, "rope_parameters": {"rope_type": "longrope", **lists, **more}}


_MULTIPLIERS = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.22, "attention_multiplier": 0.4, "logits_scaling": 5.0,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

_GLM = {"eos_token_id": [0]}  # left out, Transformers writes those of the published vocabulary

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {"sliding_window": 11}),
    "phi3-partial-tied": (
        "phi3",
        {"rope_parameters": {"partial_rotary_factor": 0.7, "rope_theta": 500.0}, "tie_word_embeddings": True},
    ),
    "phi3-longrope-short": ("phi3", _longrope(6, 128)),
    "phi3-longrope-long": ("phi3", {**_longrope(4, 32, partial_rotary_factor=0.7), "num_key_value_heads": None}),
    "olmo2": ("olmo2", {}),
    "olmo2-tied-biases": (
        "olmo2",
        {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": None, "rms_norm_eps": 1e-3},
    ),
    "olmo2-yarn": ("olmo2", {"rope_parameters": _YARN, "num_key_value_heads": 1}),
    "granite": ("granite", _MULTIPLIERS),
    "granite-tied-biases": (
        "granite",
        {**_MULTIPLIERS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 10},
    ),
    "cohere": ("cohere", {"tie_word_embeddings": True}),
    "cohere-qk-norm-untied": ("cohere", {"use_qk_norm": True, "logit_scale": 0.8}),
    "cohere-biases-yarn": ("cohere", {"attention_bias": True, "num_key_value_heads": None, "rope_parameters": _YARN}),
    "cohere2": ("cohere2", {"sliding_window": 9, "num_hidden_layers": 5, "tie_word_embeddings": True}),
    "cohere2-types-biases": (
        "cohere2",
        {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"], "attention_bias": True},
    ),
    "glm": ("glm", {**_GLM, "head_dim": 16}),
    "glm-unbiased-tied": (
        "glm",
        {**_GLM, "head_dim": 12, "attention_bias": False, "tie_word_embeddings": True, "partial_rotary_factor": 1.0},
    ),
    "glm4": ("glm4", {**_GLM, "head_dim": 16, "num_key_value_heads": 1}),
    "glm4-unbiased": ("glm4", {**_GLM, "head_dim": 12, "attention_bias": False, "rope_parameters": {
        "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.7}}),
}  # fmt: skip
