"""Phi-3 and Phi-4: fused storage, long ropes over part of a head, windows. (Abdin et al. 2024.)"""

from __future__ import annotations

from dataclasses import replace

from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families.fused import fusing
from penstock.models.registry import Family
from penstock.spec import LongRope, Mlp, ModelSpec

_SOURCE = fusing(common.source, "model.layers.{}.self_attn.qkv_proj", "model.layers.{}.mlp.gate_up_proj")


def read(reader: Reader) -> ModelSpec:
    """Keys of the later files that only ever had one value are read so."""
    limit = reader.size("max_position_embeddings", 4096)
    mixer = common.read_attention(reader, common.read_heads(reader), limit, partial=1.0)
    assert mixer.rope
    if isinstance(mixer.rope.scaling, LongRope):
        reader.size("original_max_position_embeddings")  # where the lists change
    elif mixer.rope.scaling:
        raise reader.refused("rope_scaling", reader.get("rope_scaling", None), "null, or one of type longrope")
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        reader.only(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):
        reader.only(key, 1)
    mixer = replace(mixer, window=reader.optional_size("sliding_window") or 0)
    mlp = Mlp(reader.size("intermediate_size"), reader.choice("hidden_act", common.SILU, "silu"))
    norm = common.read_norm(reader, default=1e-5)
    return common.decoder(reader, [mixer] * common.read_layers(reader), mlp, norm, limit)


FAMILY = Family("phi3", ("Phi3ForCausalLM",), read, _SOURCE)
