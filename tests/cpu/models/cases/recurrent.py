"""State spaces and delta nets."""

from __future__ import annotations

from typing import Any

_MAMBA: dict[str, Any] = {
    "num_heads": 12, "head_dim": 8, "state_size": 16, "n_groups": 1, "chunk_size": 16, "vocab_size": 99,
    "hidden_size": 48, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip

_NEXT: dict[str, Any] = {
    "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 12, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24, "num_hidden_layers": 4,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", _MAMBA),
    "mamba2-groups-biases-tied": (
        "mamba2",
        {
            **_MAMBA, "n_groups": 4, "use_bias": True, "tie_word_embeddings": True, "conv_kernel": 3, "expand": 1,
            "num_heads": 8, "head_dim": 6, "num_hidden_layers": 3, "layer_norm_epsilon": 1e-3,
        },
    ),
    "qwen3-next": ("qwen3_next", _NEXT),
    "qwen3-next-types-biases": (
        "qwen3_next",
        {
            **_NEXT, "num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_conv_kernel_dim": 3, "mlp_only_layers": [1],
            "attention_bias": True, "norm_topk_prob": False, "num_experts_per_tok": 1, "tie_word_embeddings": True,
        },
    ),
    "mamba2-limited-steps": (
        "mamba2",
        {**_MAMBA, "n_groups": 2, "use_conv_bias": False, "state_size": 5, "time_step_limit": [0.3, 0.9]},
    ),
}  # fmt: skip


def remembering(model: Any) -> None:
    """Memories that last: one that is forgotten at once holds a product of two vectors, which the norm behind it blows
    up where they are nearly at right angles, and rounding with it: Transformers' own two ways then differ by 5e-4."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.sub_(4.0)


AMENDED = {"qwen3-next": remembering, "qwen3-next-types-biases": remembering}
