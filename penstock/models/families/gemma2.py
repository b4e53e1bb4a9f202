"""Gemma 2 and 3, text: norms before and after each part, soft caps, windows between full layers. (Gemma Team 2024.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from penstock.models.binding import Wanted
from penstock.models.config import Reader, close
from penstock.models.families import decoder as common
from penstock.models.registry import Family
from penstock.models.rope_config import read_rope, read_ropes
from penstock.spec import Attention, LayerSpec, Mlp, ModelSpec

_ACT = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_THETAS = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}
_SOURCE = common.renaming(
    {
        "mixer_post_norm": "post_attention_layernorm",
        "feedforward_norm": "pre_feedforward_layernorm",
        "feedforward_post_norm": "post_feedforward_layernorm",
    }
)

_IMAGES = ("boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image", "vision_config")
_EYES = (r"vision_tower\..*", r"multi_modal_projector\..*")


def read2(reader: Reader) -> ModelSpec:
    """Every second layer, from the first on, sees a window; logits of attention and head are capped."""
    limit = reader.size("max_position_embeddings", 8192)
    reader.only("sliding_window_size", reader.get("sliding_window", 4096))  # the same, in the first files
    heads = common.read_heads(reader, kv_heads=4, head_dim=256)
    rope = read_rope(reader, heads.head_dim, limit)
    types = common.read_layer_types(reader, ("sliding_attention", "full_attention"))
    mixer = _mixer(reader, heads, softcap=_cap(reader, "attn_logit_softcapping", 50.0))
    mixers = [replace(mixer, rope=rope, window=_window(reader, kind)) for kind in types]
    return _decoder(reader, mixers, limit, _cap(reader, "final_logit_softcapping", 30.0))


def read3(reader: Reader) -> ModelSpec:
    """Every sixth layer sees all, by angles of its own; queries and keys are normalised."""
    reader.assume(
        vocab_size=262208, hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, intermediate_size=9216
    )
    limit = reader.size("max_position_embeddings", 131072)
    old, pattern = (
        reader.optional_size("_sliding_window_pattern", 6, most=common.MAX_LAYERS),
        reader.optional_size("sliding_window_pattern", most=common.MAX_LAYERS),
    )
    heads = common.read_heads(reader, kv_heads=4, head_dim=256)
    ropes = read_ropes(reader, heads.head_dim, limit, _THETAS)
    types = common.read_layer_types(reader, ["sliding_attention"] * ((pattern or old or 6) - 1) + ["full_attention"])
    reader.only("attn_logit_softcapping", None)
    mixer = _mixer(reader, heads, qk_norm=common.read_norm(reader, offset=1.0))
    mixers = [replace(mixer, rope=ropes[kind], window=_window(reader, kind)) for kind in types]
    return _decoder(reader, mixers, limit, _cap(reader, "final_logit_softcapping", None))


def read_text(reader: Reader) -> ModelSpec:
    """The text model of one that sees images too: prompts are text, and what belongs to images is not read."""
    text = reader.nested("text_config")
    if text is None:
        raise reader.refused("text_config", None, "the text model's configuration")
    reader.ignore(_IMAGES)
    reader.only("tie_word_embeddings", True)
    spec = read3(text)
    close(text)
    return spec


def _of_text(wanted: Wanted) -> str:
    return f"language_model.{_SOURCE(wanted)}"


def _mixer(reader: Reader, heads: common.Heads, **more: Any) -> Attention:
    bias, scale = reader.flag("attention_bias", False), reader.number("query_pre_attn_scalar", 256) ** -0.5
    return Attention(heads.heads, heads.kv_heads, heads.head_dim, scale, qkv_bias=bias, out_bias=bias, **more)


def _window(reader: Reader, kind: str) -> int:
    return reader.size("sliding_window", 4096) if kind == "sliding_attention" else 0


def _cap(reader: Reader, key: str, default: float | None) -> float:
    """Null says that there is none, which the default need not be."""
    return 0.0 if reader.get(key, default) is None else reader.number(key, default)


def _decoder(reader: Reader, mixers: Sequence[Attention], limit: int, softcap: float) -> ModelSpec:
    norm = common.read_norm(reader, offset=1.0)
    reader.only("use_bidirectional_attention", None, False)
    reader.ignore(("cache_implementation",))  # how another library keeps its cache
    act = reader.choice("hidden_activation", _ACT, "gelu_pytorch_tanh")
    reader.only("hidden_act", "gelu_pytorch_tanh")
    mlp = Mlp(reader.size("intermediate_size"), act)
    layers = [LayerSpec(mixer, mlp, norm, norm, norm, norm) for mixer in mixers]
    scale = reader.size("hidden_size") ** 0.5
    return common.assemble(reader, layers, norm, limit, tied=True, embedding_scale=scale, logit_softcap=softcap)


FAMILIES = (
    Family("gemma2", ("Gemma2ForCausalLM",), read2, _SOURCE, (common.ROTARY_BUFFERS,)),
    Family("gemma3_text", ("Gemma3ForCausalLM",), read3, _SOURCE),
    Family("gemma3", ("Gemma3ForConditionalGeneration",), read_text, _of_text, _EYES),
)
