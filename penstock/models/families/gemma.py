"""Gemma 1: norms of 1 + w, a scaled and tied embedding, heads wider than E / H. (Gemma Team 2024.)"""

from __future__ import annotations

from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.registry import Family
from penstock.spec import Mlp, ModelSpec

# The models were trained with the tanh form. Their files said "gelu" by mistake, which transformers from 4.38.2 to
# 4.57 corrected to the tanh form unless `hidden_activation` was set; so the mistaken word keeps that meaning here.
_ACT = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_STATED = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def read(reader: Reader) -> ModelSpec:
    limit, norm = reader.size("max_position_embeddings", 8192), common.read_norm(reader, offset=1.0)
    bias = reader.flag("attention_bias", False)
    heads = common.read_heads(reader, kv_heads=16, head_dim=256)
    mixer = common.read_attention(reader, heads, limit, qkv_bias=bias, out_bias=bias)
    act = reader.choice("hidden_act", _ACT, "gelu_pytorch_tanh")
    if reader.get("hidden_activation", None) is not None:
        act = reader.choice("hidden_activation", _STATED)
    reader.only("use_bidirectional_attention", None, False)
    mlp = Mlp(reader.size("intermediate_size"), act)
    mixers = [mixer] * common.read_layers(reader)
    return common.decoder(
        reader, mixers, mlp, norm, limit, tied=True, embedding_scale=reader.size("hidden_size") ** 0.5
    )


FAMILY = Family("gemma", ("GemmaForCausalLM",), read, common.source, (common.ROTARY_BUFFERS,))
