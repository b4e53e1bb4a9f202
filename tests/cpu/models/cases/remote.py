"""Qwen 1, Baichuan and ChatGLM, whose code lies beside their weights: compared with modules of our own."""

from __future__ import annotations

from typing import Any

_QWEN: dict[str, Any] = {
    "model_type": "qwen", "vocab_size": 99, "hidden_size": 48, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "kv_channels": 12, "max_position_embeddings": 512, "seq_length": 256, "no_bias": True,
    "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "rotary_pct": 1.0, "use_dynamic_ntk": True,
    "use_logn_attn": True, "scale_attn_weights": True, "use_flash_attn": "auto", "tie_word_embeddings": False,
}  # fmt: skip
_BAICHUAN: dict[str, Any] = {
    "model_type": "baichuan", "vocab_size": 64000, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
_CHATGLM: dict[str, Any] = {
    "model_type": "chatglm", "padded_vocab_size": 99, "vocab_size": 99, "hidden_size": 48, "ffn_hidden_size": 80,
    "num_layers": 2, "num_attention_heads": 4, "kv_channels": 12, "multi_query_attention": True,
    "multi_query_group_num": 2, "seq_length": 256, "add_bias_linear": False, "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True, "apply_residual_connection_post_layernorm": False, "rmsnorm": True,
    "post_layer_norm": True, "layernorm_epsilon": 1e-5, "original_rope": True, "tie_word_embeddings": False,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen": ("qwen", _QWEN),
    "qwen-biases": ("qwen", {**_QWEN, "no_bias": False, "rotary_emb_base": 500, "use_dynamic_ntk": False}),
    "baichuan-7b": ("baichuan", {**_BAICHUAN, "max_position_embeddings": 256}),
    "baichuan-13b": ("baichuan", {**_BAICHUAN, "model_max_length": 256, "num_attention_heads": 6}),
    "baichuan2-7b": ("baichuan", {**_BAICHUAN, "vocab_size": 125696, "max_position_embeddings": 256}),
    "baichuan2-13b": ("baichuan", {**_BAICHUAN, "vocab_size": 125696, "model_max_length": 256}),
    "chatglm": ("chatglm", _CHATGLM),
    "chatglm-biases": ("chatglm", {**_CHATGLM, "add_bias_linear": True, "multi_query_attention": False}),
    "chatglm-glm4": ("chatglm", {**_CHATGLM, "rope_ratio": 500, "kv_channels": 20, "multi_query_group_num": 1}),
}
