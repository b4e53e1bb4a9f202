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

_LATENT: dict[str, Any] = {
    "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "num_key_value_heads": 4,
    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
    "first_k_dense_replace": 1, "num_hidden_layers": 3,
}  # fmt: skip

_GROK: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attn_output_multiplier": 0.3, "max_attn_value": 1.5, "embedding_multiplier_scale": 6.9,
    "output_multiplier_scale": 0.57, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "num_experts": 4,
    "num_experts_per_tok": 2, "tie_word_embeddings": True,
}  # fmt: skip

_GPT_OSS: dict[str, Any] = {
    "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 32, "hidden_size": 64, "head_dim": 12,
    "sliding_window": 9, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    },
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
    "deepseek-v2-greedy": ("deepseek_v2", {**_LATENT, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek-v2-groups-yarn": (
        "deepseek_v2",
        {
            **_LATENT, "q_lora_rank": 20, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
            "routed_scaling_factor": 16.0, "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
                "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
            },
        },
    ),
    "deepseek-v3": ("deepseek_v3", {**_LATENT, "q_lora_rank": 20, "n_group": 4, "topk_group": 2}),
    "deepseek-v3-halves-biases": (
        "deepseek_v3",
        {
            **_LATENT, "q_lora_rank": 16, "n_group": 1, "topk_group": 1, "rope_interleave": False,
            "attention_bias": True, "norm_topk_prob": False, "n_shared_experts": 1,
        },
    ),
    "gpt-oss": ("gpt_oss", _GPT_OSS),
    "gpt-oss-one-expert": (
        "gpt_oss",
        {
            **_GPT_OSS, "num_experts_per_tok": 1, "attention_bias": False, "num_key_value_heads": 4,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "num_hidden_layers": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt-oss-every-expert-tied": (
        "gpt_oss",
        {**_GPT_OSS, "num_experts_per_tok": 5, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "grok-1": ("grok-1", _GROK),
    "grok-1-untied-one-expert": ("grok-1", {**_GROK, "tie_word_embeddings": False, "num_experts_per_tok": 1}),
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
