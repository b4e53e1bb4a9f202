"""Qwen2 and Qwen2.5: a Llama with biases on q, k and v, and windows from some layer on. (Yang et al. 2024.)"""

from __future__ import annotations

from dataclasses import replace

from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.registry import Family
from penstock.spec import Attention, Mlp, ModelSpec


def read(reader: Reader) -> ModelSpec:
    limit = reader.size("max_position_embeddings", 32768)
    mixer = common.read_attention(reader, common.read_heads(reader), limit, qkv_bias=True)
    reader.only("use_mrope", False, None)
    mlp = Mlp(reader.size("intermediate_size"), reader.choice("hidden_act", common.SILU, "silu"))
    return common.decoder(reader, windowed(reader, mixer), mlp, common.read_norm(reader), limit)


def windowed(reader: Reader, mixer: Attention) -> list[Attention]:
    """One mixer a layer. `layer_types` says which look through the window, else those from `max_window_layers` on do.

    `sliding_window` counts only where `use_sliding_window` is true: published files state one beside false.
    """
    count, use = common.read_layers(reader), reader.flag("use_sliding_window", False)
    window, first = reader.optional_size("sliding_window", 4096), reader.get("max_window_layers", 28)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise reader.refused("max_window_layers", first, "a number of layers")
    window = window if use and reader.get("sliding_window", 4096) is not None else None
    derived = ["sliding_attention" if window and i >= first else "full_attention" for i in range(count)]
    types = common.read_layer_types(reader, derived, windows=window is not None)
    return [replace(mixer, window=window or 0) if t == "sliding_attention" else mixer for t in types]


FAMILY = Family("qwen2", ("Qwen2ForCausalLM",), read, common.source)
