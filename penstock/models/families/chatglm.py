"""ChatGLM 2 and 3, and GLM-4 in its first form: q, k and v in one tensor, half of each head turned. (GLM Team 2024.)

ChatGLM-6B, the first, has the same architecture by name and nothing else in common: see `chatglm6b`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.models.binding import Source, Wanted
from penstock.models.config import Reader
from penstock.models.families import chatglm6b
from penstock.models.families.decoder import MAX_HEAD_DIM, MAX_LAYERS, named
from penstock.models.families.fused import fusing
from penstock.models.registry import Family
from penstock.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, Rope

_LAYER = "transformer.encoder.layers.{}"
_PARTS = {
    "attention.o": "self_attention.dense",
    "mixer_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm",
    "feedforward.down": "mlp.dense_4h_to_h",
}
_WHOLE = {
    "embedding": "transformer.embedding.word_embeddings",
    "final_norm": "transformer.encoder.final_layernorm",
    "head": "transformer.output_layer",
}
_SINGLE = {  # keys that every published file has with one value, or that are read so where it has none
    "apply_residual_connection_post_layernorm": (False,), "fp32_residual_connection": (False,),
    "interleaved_qkv": (False,), "original_rope": (True,), "post_layer_norm": (True,), "pre_seq_len": (None,),
    "quantization_bit": (0, None), "rmsnorm": (True,), "tie_word_embeddings": (False,),
}  # fmt: skip
_IGNORED = (  # scores are float32 here, and what a layer divides them by it multiplies them with again
    "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion", "classifier_dropout",
    "prefix_projection", "vocab_size",
)  # fmt: skip


def read(reader: Reader) -> ModelSpec:
    """Half of each head is turned, neighbours together, by a base that `rope_ratio` multiplies."""
    if any(reader.get(key, None) is not None for key in chatglm6b.KEYS):
        return chatglm6b.read(reader)
    for key, values in _SINGLE.items():
        reader.only(key, *values)
    reader.ignore(_IGNORED)
    layers = reader.size("num_layers", most=MAX_LAYERS)
    reader.only("num_hidden_layers", layers)
    bias, norm = reader.flag("add_bias_linear", False), Norm(reader.number("layernorm_epsilon", 1e-5))
    mlp = Mlp(reader.size("ffn_hidden_size"), "silu", bias)
    layer = LayerSpec(_mixer(reader, bias), mlp, norm, norm)
    return ModelSpec(
        layers=(layer,) * layers,
        vocab_size=reader.size("padded_vocab_size"),
        hidden_size=reader.size("hidden_size"),
        final_norm=norm,
        max_position=reader.size("seq_length"),
    )


def _mixer(reader: Reader, bias: bool) -> Attention:
    heads, size = reader.size("num_attention_heads"), reader.size("kv_channels", most=MAX_HEAD_DIM)
    groups = reader.size("multi_query_group_num", heads)
    kv_heads = groups if reader.flag("multi_query_attention", False) else heads
    if size % 4:
        raise reader.refused("kv_channels", size, "a multiple of 4: half of it turns in pairs")
    if heads % kv_heads:
        raise reader.refused("multi_query_group_num", kv_heads, f"a divisor of num_attention_heads = {heads}")
    rope = Rope(10000.0 * _ratio(reader), size // 2, interleaved=True)
    qkv_bias = reader.flag("add_qkv_bias", False) or bias
    return Attention(heads, kv_heads, size, size**-0.5, rope, qkv_bias, bias)


def _ratio(reader: Reader) -> float:
    """ChatGLM2-6B-32K divides positions by its ratio, and only its code says so: of that vocabulary none but
    ChatGLM3-6B-32K's 50 is sure to be a factor of the base."""
    ratio = reader.number("rope_ratio", 1.0)
    if reader.size("padded_vocab_size") == 65024 and ratio not in (1.0, 50.0):
        raise reader.refused("rope_ratio", ratio, "1, or 50 as of ChatGLM3-6B-32K, with a vocabulary of 65024")
    return ratio


def _plain(wanted: Wanted) -> str:
    return named(wanted, _LAYER, _PARTS, _WHOLE)


source = fusing(_plain, f"{_LAYER}.self_attention.query_key_value", f"{_LAYER}.mlp.dense_h_to_4h")


def _source_of(config: Mapping[str, Any]) -> Source:
    return chatglm6b.source if any(config.get(key) is not None for key in chatglm6b.KEYS) else source


FAMILY = Family(
    "chatglm",
    ("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    read,
    source,
    (r"transformer\.rotary_pos_emb\.inv_freq", chatglm6b.IGNORED),
    by_config=_source_of,
)
