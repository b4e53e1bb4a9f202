"""Mistral: a Llama whose every layer may look back through a window only. (Jiang et al. 2023.)"""

from __future__ import annotations

from dataclasses import replace

from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.registry import Family
from penstock.spec import Mlp, ModelSpec


def read(reader: Reader) -> ModelSpec:
    """`sliding_window` null: no window; left out: 4096, as the first files meant it."""
    limit = reader.size("max_position_embeddings", 131072)
    mixer = common.read_attention(reader, common.read_heads(reader, kv_heads=8), limit)
    window = reader.get("sliding_window", 4096)
    mixer = replace(mixer, window=0 if window is None else reader.size("sliding_window", 4096))
    mlp = Mlp(reader.size("intermediate_size"), reader.choice("hidden_act", common.SILU, "silu"))
    return common.decoder(reader, [mixer] * common.read_layers(reader), mlp, common.read_norm(reader), limit)


FAMILY = Family("mistral", ("MistralForCausalLM",), read, common.source, (common.ROTARY_BUFFERS,))
