"""T5 and BART."""

from __future__ import annotations

from typing import Any

import torch

T5: dict[str, Any] = {
    "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_decoder_layers": 2, "decoder_start_token_id": 0,
    "tie_word_embeddings": True,
}  # fmt: skip
V1_1: dict[str, Any] = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BART: dict[str, Any] = {
    "encoder_ffn_dim": 80, "decoder_ffn_dim": 72, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "t5-few-buckets": (
        "t5",
        {**T5, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "num_decoder_layers": 3},
    ),
    "t5-wide-heads": ("t5", {**T5, "d_kv": 20, "num_heads": 2, "layer_norm_epsilon": 1e-3, "num_layers": 1}),
    "t5-v1.1": ("t5", {**V1_1, "relative_attention_max_distance": 40}),
    "t5-v1.1-silu": ("t5", {**V1_1, "feed_forward_proj": "gated-silu", "d_ff": 72, "num_layers": 3}),
    "bart": ("bart", BART),
    "bart-scaled-deep-decoder": ("bart", {**BART, "scale_embedding": True, "decoder_layers": 3}),
    "bart-heads-relu": (
        "bart",
        {**BART, "encoder_attention_heads": 6, "decoder_attention_heads": 2, "activation_function": "relu"},
    ),
}


def _untied(model: Any) -> None:
    """As the published files are; Transformers 5 ties them all."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())


def _biased(model: Any) -> None:
    model.final_logits_bias.copy_(torch.randn_like(model.final_logits_bias))


AMENDED = {
    **{case: _untied for case, (_, keys) in ENCODERS.items() if not keys["tie_word_embeddings"]},
    **{case: _biased for case, (family, _) in ENCODERS.items() if family == "bart"},
}
