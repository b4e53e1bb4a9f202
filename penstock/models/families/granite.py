"""Granite 3: a Llama with a multiplier at the embedding, the scores, what is added and the logits. (IBM 2024.)"""

from __future__ import annotations

from dataclasses import replace

from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.registry import Family
from penstock.spec import LayerSpec, Mlp, ModelSpec


def read(reader: Reader) -> ModelSpec:
    limit, norm = reader.size("max_position_embeddings", 2048), common.read_norm(reader)
    bias = reader.flag("attention_bias", False)
    mixer = common.read_attention(reader, common.read_heads(reader), limit, qkv_bias=bias, out_bias=bias)
    mixer = replace(mixer, scale=reader.number("attention_multiplier", 1.0))
    act = reader.choice("hidden_act", common.SILU, "silu")
    mlp = Mlp(reader.size("intermediate_size"), act, reader.flag("mlp_bias", False))
    layer = LayerSpec(mixer, mlp, norm, norm, residual_scale=reader.number("residual_multiplier", 1.0))
    embedding, logits = reader.number("embedding_multiplier", 1.0), 1 / reader.number("logits_scaling", 1.0)
    layers = [layer] * common.read_layers(reader)
    return common.assemble(reader, layers, norm, limit, embedding_scale=embedding, logit_scale=logits)


FAMILY = Family("granite", ("GraniteForCausalLM",), read, common.source)
