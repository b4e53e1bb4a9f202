"""Qwen3-MoE: a Qwen3 of many small experts, none of them shared. (Yang et al. 2025.)"""

from __future__ import annotations

from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families.experts import read_router, sparse_layers
from penstock.models.families.qwen2_moe import source, without_windows
from penstock.models.registry import Family
from penstock.spec import LayerSpec, Mlp, ModelSpec, Moe


def read(reader: Reader) -> ModelSpec:
    limit, norm = reader.size("max_position_embeddings", 32768), common.read_norm(reader)
    bias, heads = reader.flag("attention_bias", False), common.read_heads(reader, kv_heads=4)
    mixer = common.read_attention(reader, heads, limit, qkv_bias=bias, out_bias=bias, qk_norm=norm)
    act = reader.choice("hidden_act", common.SILU, "silu")
    router = read_router(reader, renormalize=float(reader.flag("norm_topk_prob", False)))
    moe = Moe(router, Mlp(reader.size("moe_intermediate_size", 768), act))
    parts = sparse_layers(reader, Mlp(reader.size("intermediate_size"), act), moe)
    without_windows(reader, len(parts))
    return common.assemble(reader, [LayerSpec(mixer, part, norm, norm) for part in parts], norm, limit)


FAMILY = Family("qwen3_moe", ("Qwen3MoeForCausalLM",), read, source)
