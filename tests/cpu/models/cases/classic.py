"""GPT-2 and its contemporaries."""

from __future__ import annotations

from typing import Any

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    "gpt2-untied-inner": ("gpt2", {"n_inner": 72, "activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    "gpt2-scales": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "num_hidden_layers": 3}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False, "reorder_and_upcast_attn": True}),
    "neox": ("gpt_neox", {"hidden_size": 64}),
    "neox-serial-no-biases": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.5}),
    "neox-all-rotated": ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 500, "hidden_act": "gelu_fast"}),
    "neox-tied-linear": (
        "gpt_neox",
        {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rotary_pct": 0.5},
    ),
    "neox-dynamic": ("gpt_neox", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rotary_pct": 0.5}),
    "gptj": ("gptj", {"rotary_dim": 6}),
    "gptj-whole-inner": ("gptj", {"rotary_dim": 12, "n_inner": 72, "activation_function": "gelu"}),
    "gptj-tied": ("gptj", {"rotary_dim": 2, "tie_word_embeddings": True, "num_attention_heads": 2}),
}
