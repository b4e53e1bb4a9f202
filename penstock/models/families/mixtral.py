"""Mixtral: a Mistral whose feed-forwards are mixtures of experts. (Jiang et al. 2024.)"""

from __future__ import annotations

from dataclasses import replace

from penstock.ir import Value
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families.experts import from_experts, read_router
from penstock.models.registry import Family
from penstock.spec import Mlp, ModelSpec, Moe


def read(reader: Reader) -> ModelSpec:
    """`sliding_window` null or left out: no window, which is what all published files say."""
    limit = reader.size("max_position_embeddings", 131072)
    mixer = common.read_attention(reader, common.read_heads(reader, kv_heads=8), limit, theta=1e6)
    mixer = replace(mixer, window=reader.optional_size("sliding_window") or 0)
    expert = Mlp(reader.size("intermediate_size"), reader.choice("hidden_act", common.SILU, "silu"))
    moe = Moe(read_router(reader, renormalize=1.0), expert)
    norm = common.read_norm(reader, default=1e-5)
    return common.decoder(reader, [mixer] * common.read_layers(reader), moe, norm, limit)


def source(wanted: Wanted) -> str | Value:
    block = f"model.layers.{wanted.layer}.block_sparse_moe"
    if wanted.part == "feedforward.router.weight":
        return f"{block}.gate.weight"
    return from_experts(wanted, f"{block}.experts", "w1", "w3", "w2") or common.source(wanted)


FAMILY = Family("mixtral", ("MixtralForCausalLM",), read, source, (common.ROTARY_BUFFERS,))
