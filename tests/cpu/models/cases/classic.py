"""GPT-2 and its contemporaries."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor


def rope(kind: str, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


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
    "opt": ("opt", {"ffn_dim": 80, "tie_word_embeddings": True}),
    "opt-350m": (
        "opt",
        {"ffn_dim": 80, "do_layer_norm_before": False, "word_embed_proj_dim": 32, "tie_word_embeddings": True},
    ),
    "opt-no-final-norm-untied": ("opt", {"_remove_final_layer_norm": True, "ffn_dim": 72}),
    "opt-galactica": (
        "opt",
        {"ffn_dim": 80, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "phi": ("phi", {"num_key_value_heads": None}),
    "phi-groups-gelu": ("phi", {"hidden_act": "gelu", "hidden_size": 80, "partial_rotary_factor": 0.4}),
    "phi-dynamic": ("phi", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "starcoder2": ("starcoder2", {"sliding_window": None, "tie_word_embeddings": True}),
    "starcoder2-window": ("starcoder2", {"sliding_window": 11, "norm_epsilon": 1e-3}),
    "starcoder2-no-biases": ("starcoder2", {"use_bias": False, "num_key_value_heads": 1}),
    "starcoder2-yarn": ("starcoder2", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "falcon-7b": ("falcon", {"tie_word_embeddings": True}),
    "falcon-groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "rope_theta": 500.0}),
    "falcon-11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 72},
    ),
    # Slopes and distances that bfloat16, to which Transformers rounds them, holds exactly.
    "falcon-rw": (
        "falcon",
        {"alibi": True, "bias": True, "parallel_attn": False, "multi_query": False, "num_attention_heads": 6},
    ),
    "falcon-rw-parallel": ("falcon", {"alibi": True, "num_attention_heads": 8, "layer_norm_epsilon": 1e-3}),
    "falcon-dynamic": ("falcon", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "bloom": ("bloom", {"tie_word_embeddings": True}),
    "bloom-6-heads": ("bloom", {"num_attention_heads": 6, "seq_length": 128, "num_hidden_layers": 3}),
    "mpt": ("mpt", {"max_seq_len": 128, "tie_word_embeddings": True}),
    "mpt-storywriter": (
        "mpt",
        {"max_seq_len": 128, "num_attention_heads": 6, "attn_config": {"alibi_bias_max": 16, "clip_qkv": 0.4}},
    ),
    "mpt-scaled": ("mpt", {"max_seq_len": 128, "attn_config": {"softmax_scale": 0.5}, "layer_norm_epsilon": 1e-3}),
    "mpt-biases-norms": (
        "mpt",
        {
            "max_seq_len": 128,
            "no_bias": False,
            "logit_scale": "inv_sqrt_d_model",
            "attn_config": {"qk_ln": True},
        },
    ),
    "bigcode": ("gpt_bigcode", {"tie_word_embeddings": True}),
    "bigcode-heads": ("gpt_bigcode", {"multi_query": False, "n_inner": 72, "n_head": 4}),
}


def once(model: Any) -> None:
    """Without SDPA, Transformers 5.17 adds Falcon's ALiBi twice: with the mask, and by itself."""
    model.config._attn_implementation = "sdpa"


def steeper(model: Any) -> None:
    """`alibi_bias_max`, which Transformers reads, and leaves at 8."""
    most = model.config.attn_config.alibi_bias_max
    model.transformer.build_mpt_alibi_tensor = partial(build_mpt_alibi_tensor, alibi_bias_max=most)


def foundry(model: Any) -> None:
    """What the publisher's own code does beyond Transformers': biases, norms of q and k, a factor on the logits."""
    width = model.config.d_model
    for block in model.transformer.blocks:
        for part in (block.attn.Wqkv, block.attn.out_proj, block.ffn.up_proj, block.ffn.down_proj):
            part.bias = torch.nn.Parameter(torch.zeros(part.out_features))
        block.attn.q_ln, block.attn.k_ln = (torch.nn.LayerNorm(width) for _ in "qk")
        block.attn.Wqkv.register_forward_hook(partial(normalised, block.attn))
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.bias = torch.nn.Parameter(torch.zeros(width))
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * width**-0.5)


def normalised(attention: Any, module: Any, inputs: Any, qkv: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv.chunk(3, -1)
    return torch.cat((attention.q_ln(q), attention.k_ln(k), v), -1)


AMENDED = {
    "falcon-rw": once,
    "falcon-rw-parallel": once,
    "mpt-storywriter": steeper,
    "mpt-biases-norms": foundry,
}
