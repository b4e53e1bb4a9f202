"""Mixtures of experts."""

from __future__ import annotations

from typing import Any

from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig

DbrxAttentionConfig.rope_theta = 10000.0  # transformers 5.17 reads it when it makes a model, and its config has none
_SMALL = {"num_experts": 5, "moe_intermediate_size": 20}

_DBRX: dict[str, Any] = {
    "d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
    "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 4, "moe_top_k": 2},
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral-one-expert-window": (
        "mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 9, "head_dim": 16},
    ),
    "mixtral-every-expert": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3}),
    "qwen2-moe": ("qwen2_moe", {**_SMALL, "shared_expert_intermediate_size": 24}),
    "qwen2-moe-dense-layers": (
        "qwen2_moe",
        {
            **_SMALL, "shared_expert_intermediate_size": 28, "num_hidden_layers": 4, "decoder_sparse_step": 2,
            "mlp_only_layers": [3], "norm_topk_prob": True, "num_experts_per_tok": 1, "qkv_bias": False,
        },
    ),
    "qwen3-moe": ("qwen3_moe", {**_SMALL, "head_dim": 16, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen3-moe-dense-layer-tied": (
        "qwen3_moe",
        {
            **_SMALL, "head_dim": 12, "num_experts_per_tok": 2, "mlp_only_layers": [0], "tie_word_embeddings": True,
            "attention_bias": True,
        },
    ),
    "dbrx": ("dbrx", {**_DBRX, "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.7}}),
    "dbrx-one-expert-as-it-is": (
        "dbrx",
        {
            **_DBRX, "attn_config": {"kv_n_heads": 4, "clip_qkv": 50},
            "ffn_config": {**_DBRX["ffn_config"], "moe_top_k": 1, "moe_normalize_expert_weights": None},
        },
    ),
    "dbrx-root-of-squares": (
        "dbrx",
        {
            **_DBRX, "attn_config": {"kv_n_heads": 1, "clip_qkv": 1},
            "ffn_config": {**_DBRX["ffn_config"], "moe_top_k": 3, "moe_normalize_expert_weights": 2.0},
        },
    ),
}  # fmt: skip
