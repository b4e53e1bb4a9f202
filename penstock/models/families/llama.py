"""Llama 1, 2, 3 and 3.x. (Touvron et al. 2023; Grattafiori et al. 2024.)"""

from __future__ import annotations

from dataclasses import replace

from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.registry import Family
from penstock.spec import Mlp, ModelSpec


def read(reader: Reader) -> ModelSpec:
    """Llama 1's first files state the length as `max_sequence_length` alone; Vicuna's the one that scaling reaches."""
    meant = reader.optional_size("max_sequence_length")
    limit = reader.size("max_position_embeddings", meant or 2048)
    bias = reader.flag("attention_bias", False)
    mixer = common.read_attention(reader, common.read_heads(reader), limit, qkv_bias=bias, out_bias=bias)
    act = reader.choice("hidden_act", common.SILU, "silu")
    mlp = Mlp(reader.size("intermediate_size"), act, reader.flag("mlp_bias", False))
    spec = common.decoder(reader, [mixer] * common.read_layers(reader), mlp, common.read_norm(reader), limit)
    return replace(spec, max_position=max(spec.max_position, meant or 0))


FAMILY = Family("llama", ("LlamaForCausalLM", "LLaMAForCausalLM"), read, common.source, (common.ROTARY_BUFFERS,))
