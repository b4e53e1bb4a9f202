"""Command-R: attention and feed-forward side by side behind one LayerNorm, interleaved rope. (Cohere 2024.)

Command-R7B (cohere2): three layers of four rotate and see a window, the fourth does neither. (Cohere Team 2025.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.registry import Family
from penstock.spec import Attention, LayerNorm, LayerSpec, Mlp, ModelSpec


def read(reader: Reader) -> ModelSpec:
    """The first files state the length that the model is meant for as `model_max_length`."""
    limit = reader.size("max_position_embeddings", 8192)
    limit = max(limit, reader.optional_size("model_max_length") or 0)
    mixer = _mixer(reader, limit, 500000.0)
    if reader.flag("use_qk_norm", False):
        mixer = replace(mixer, qk_norm=_norm(reader), qk_norm_over="heads")
    return _decoder(reader, [mixer] * common.read_layers(reader), limit)


def read2(reader: Reader) -> ModelSpec:
    limit = reader.size("max_position_embeddings", 8192)
    pattern = (
        reader.optional_size("sliding_window_pattern", most=common.MAX_LAYERS)
        or reader.optional_size("_sliding_window_pattern", most=common.MAX_LAYERS)
        or 4
    )
    reader.only("layer_switch", pattern)  # the pattern's name in the first files
    reader.only("order_of_interleaved_layers", "local_attn_first")
    reader.only("position_embedding_type", "rope_gptj")
    reader.only("rotary_pct", 1.0)
    for key in ("use_gated_activation", "use_parallel_block"):
        reader.only(key, True)
    reader.only("use_qk_norm", False)
    reader.ignore(("cache_implementation", "use_embedding_sharing", "use_parallel_embedding"))  # how others store it
    types = common.read_layer_types(reader, ["sliding_attention"] * (pattern - 1) + ["full_attention"])
    mixer, window = _mixer(reader, limit, 10000.0), reader.size("sliding_window", 4096)
    kinds = {"sliding_attention": replace(mixer, window=window), "full_attention": replace(mixer, rope=None)}
    return _decoder(reader, [kinds[each] for each in types], limit)


def _mixer(reader: Reader, limit: int, theta: float) -> Attention:
    bias, heads = reader.flag("attention_bias", False), common.read_heads(reader)
    return common.read_attention(reader, heads, limit, qkv_bias=bias, out_bias=bias, interleaved=True, theta=theta)


def _norm(reader: Reader) -> LayerNorm:
    return LayerNorm(reader.number("layer_norm_eps", 1e-5), bias=False)


def _decoder(reader: Reader, mixers: Sequence[Attention], limit: int) -> ModelSpec:
    norm = _norm(reader)
    mlp = Mlp(reader.size("intermediate_size"), reader.choice("hidden_act", common.SILU, "silu"))
    layers = [LayerSpec(mixer, mlp, norm, None, residual="parallel") for mixer in mixers]
    return common.assemble(reader, layers, norm, limit, tied=True, logit_scale=reader.number("logit_scale", 0.0625))


FAMILIES = (
    Family("cohere", ("CohereForCausalLM",), read, common.source),
    Family("cohere2", ("Cohere2ForCausalLM",), read2, common.source),
)
