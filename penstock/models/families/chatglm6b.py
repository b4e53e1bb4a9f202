"""ChatGLM-6B, the first: GLM-130B's layers, 2-D positions, and prompts that see all of themselves. (Du et al. 2022,
Zeng et al. 2023.)"""

from __future__ import annotations

from penstock.ir import Value
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import classic
from penstock.models.families.decoder import MAX_LAYERS, named
from penstock.models.storage import fused_qkv
from penstock.spec import Attention, LayerNorm, LayerSpec, Mlp, ModelSpec, Rope

KEYS = ("position_encoding_2d", "inner_hidden_size", "max_sequence_length")  # that no later one has
_PARTS = {
    **classic.qkv("attention.query_key_value"),
    "attention.o": "attention.dense",
    "mixer_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm",
    "feedforward.up": "mlp.dense_h_to_4h",
    "feedforward.down": "mlp.dense_4h_to_h",
}
_WHOLE = {
    "embedding": "transformer.word_embeddings",
    "final_norm": "transformer.final_layernorm",
    "head": "lm_head",
}
IGNORED = r"transformer\.(layers\.\d+\.attention\.)?rotary_emb\.inv_freq"
# With 2-D positions each half of a head is turned by a place of its own; tokens are read with the generation settings.
_SINGLE = {
    "position_encoding_2d": (True,), "pre_seq_len": (None,), "quantization_bit": (0, None),
    "quantization_embeddings": (False, None),
}  # fmt: skip
_TOKENS = ("gmask_token_id", "mask_token_id", "prefix_projection")


def read(reader: Reader) -> ModelSpec:
    """Behind each norm the stream goes on from what the norm gives, times sqrt(2 layers)."""
    reader.get("position_encoding_2d")
    for key, values in _SINGLE.items():
        reader.only(key, *values)
    reader.ignore(_TOKENS)
    layers, hidden = reader.size("num_layers", most=MAX_LAYERS), reader.size("hidden_size")
    reader.only("num_hidden_layers", layers)
    heads = classic.read_heads(reader)
    if heads.head_dim % 4:
        raise reader.refused("hidden_size", hidden, f"{heads.heads} heads of a multiple of 4: two halves turn in pairs")
    rope = Rope(10000.0, heads.head_dim // 2, planar=True)
    size = heads.head_dim
    mixer = Attention(heads.heads, heads.heads, size, size**-0.5, rope, qkv_bias=True, out_bias=True, prefix=True)
    norm = LayerNorm(reader.number("layernorm_epsilon", 1e-5))
    mlp = Mlp(reader.optional_size("inner_hidden_size") or 4 * hidden, "gelu_tanh", bias=True, gated=False)
    layer = LayerSpec(mixer, mlp, norm, norm, residual="normed", residual_scale=(2.0 * layers) ** 0.5)
    return ModelSpec(
        layers=(layer,) * layers,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden,
        final_norm=norm,
        max_position=reader.size("max_sequence_length"),
        tied_head=reader.flag("tie_word_embeddings", True),
    )


def source(wanted: Wanted) -> Value | str:
    name = named(wanted, "transformer.layers.{}", _PARTS, _WHOLE)
    return fused_qkv(wanted, name, grouped=True) if classic.is_qkv(wanted) else name
