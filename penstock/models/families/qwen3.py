"""Qwen3, dense: a Qwen2 without those biases, and with norms over each head of q and k. (Yang et al. 2025.)"""

from __future__ import annotations

from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families.qwen2 import windowed
from penstock.models.registry import Family
from penstock.spec import Mlp, ModelSpec


def read(reader: Reader) -> ModelSpec:
    limit, norm = reader.size("max_position_embeddings", 32768), common.read_norm(reader)
    bias = reader.flag("attention_bias", False)
    heads = common.read_heads(reader, head_dim=128)
    mixer = common.read_attention(reader, heads, limit, qkv_bias=bias, out_bias=bias, qk_norm=norm)
    mlp = Mlp(reader.size("intermediate_size"), reader.choice("hidden_act", common.SILU, "silu"))
    return common.decoder(reader, windowed(reader, mixer), mlp, norm, limit)


FAMILY = Family("qwen3", ("Qwen3ForCausalLM",), read, common.source)
