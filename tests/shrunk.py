"""Published configs with every size made small and every mechanism kept: models of all families for a device.

Numbers are multiples of what tensor cores like, windows are shorter than the texts, experts few.
"""

from __future__ import annotations

from typing import Any

from tests.facts.tensors import published_config

HIDDEN, LAYERS, HEADS, HEAD, VOCABULARY, POSITIONS = 256, 3, 4, 64, 512, 512

# By what the key says: its small value, whatever the family.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "n_embed", "d_model", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("head_dim", "kv_channels"), HEAD),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 384),
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("sliding_window", "sliding_window_size"), 48),
}
_KV = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "multi_query_group_num")
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
_LATENT = {
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}

# family -> (the published file, what is changed besides)
SHRUNK: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama-3.1-8B", {}),
    "mistral": ("Mistral-7B-v0.1", {}),
    "qwen2": ("Qwen2.5-7B-Instruct", {}),
    "qwen3": ("Qwen3-8B", {}),
    "gemma": ("gemma-2b", {}),
    "gemma2": ("gemma-2-9b", {"query_pre_attn_scalar": 64}),
    "gemma3_text": ("gemma-3-1b-it", {"query_pre_attn_scalar": 64, "sliding_window_pattern": 2}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("pythia-160m", {}),
    "gptj": ("gpt-j-6b", {"rotary_dim": 32}),
    "opt": ("opt-125m", {}),
    "phi": ("phi-2", {"partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2-3b", {}),
    "falcon": ("falcon-7b", {}),
    "falcon-new": ("falcon-40b", {}),
    "falcon-alibi": ("falcon-rw-1b", {}),
    "bloom": ("bloom-560m", {}),
    "mpt": ("mpt-7b", {}),
    "phi3": ("Phi-3-mini-4k-instruct", {}),
    "olmo2": ("OLMo-2-1124-7B", {}),
    "granite": ("granite-3.1-2b-instruct", {}),
    "cohere": ("c4ai-command-r-plus", {}),
    "cohere2": ("c4ai-command-r7b-12-2024", {"layer_switch": 2, "sliding_window_pattern": 2}),
    "glm": ("glm-4-9b-chat-hf", {}),
    "glm4": ("GLM-4-9B-0414", {}),
    "qwen": ("Qwen-7B", {}),
    "baichuan": ("Baichuan2-7B-Chat", {"vocab_size": 125696}),
    "baichuan-alibi": ("Baichuan2-13B-Chat", {"vocab_size": 125696}),
    "chatglm": ("chatglm3-6b", {}),
    "mixtral": ("Mixtral-8x7B-v0.1", {}),
    "qwen2_moe": ("Qwen1.5-MoE-A2.7B-Chat", {}),
    "qwen3_moe": ("Qwen3-30B-A3B", {}),
    "dbrx": ("dbrx-base", {}),
    "grok-1": ("grok-1", {}),
    "gpt_oss": ("gpt-oss-20b", {"quantization_config": None}),
    "qwen3_next": ("Qwen3-Next-80B-A3B-Instruct", {"full_attention_interval": 2, **_DELTA}),
    "mamba2": ("mamba2-2.7b-hf", {"num_heads": 8, "time_step_rank": 16}),
    "deepseek_v2": ("DeepSeek-V2-Lite", _LATENT),
    "deepseek_v3": (
        "DeepSeek-V3",
        {**_LATENT, "q_lora_rank": 128, "quantization_config": None, "n_group": 4, "topk_group": 2},
    ),
}


def shrunk(name: str) -> dict[str, Any]:
    """The small config of one of SHRUNK."""
    stem, changes = SHRUNK[name]
    return _small(published_config(stem)) | changes


def _small(config: dict[str, Any]) -> dict[str, Any]:
    heads = next((config[k] for k in ("num_attention_heads", "n_head", "n_heads") if k in config), 0)
    out = {key: _value(key, value, heads) for key, value in config.items()}
    if isinstance(out.get("layer_types"), list):
        out["layer_types"] = out["layer_types"][:LAYERS]
    return out


def _value(key: str, value: Any, heads: int) -> Any:
    if isinstance(value, dict) and key in ("attn_config", "ffn_config"):
        return {k: _value(k, v, heads) for k, v in value.items()}
    if value is None or isinstance(value, bool):
        return value
    if key.endswith("_token_id"):
        return None  # a text ends by its length alone
    if key in _KV:
        return 1 if value == 1 else HEADS if value == heads else 2
    if key in ("num_experts_per_tok", "experts_per_token", "moe_top_k"):
        return min(value, 3)
    return _SIZES.get(key, value)
