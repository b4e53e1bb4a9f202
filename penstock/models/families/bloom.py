"""BLOOM: ALiBi, and a norm of the embedding. (BigScience Workshop 2022.)"""

from __future__ import annotations

from dataclasses import replace

from penstock.ir import Value
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import classic
from penstock.models.families import decoder as common
from penstock.models.families.decoder import assemble
from penstock.models.registry import Family
from penstock.models.storage import fused_qkv
from penstock.spec import Alibi, LayerSpec, Mlp, ModelSpec, alibi_slopes

# How the training code fused and rounded, and a constant that softmax cancels.
_EXECUTION = (
    "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv",
    "slow_but_exact",
)  # fmt: skip
_PARTS = {
    **classic.qkv("self_attention.query_key_value"),
    "attention.o": "self_attention.dense",
    "mixer_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm",
    "feedforward.up": "mlp.dense_h_to_4h",
    "feedforward.down": "mlp.dense_4h_to_h",
}
_WHOLE = {
    "embedding": "transformer.word_embeddings",
    "embedding_norm": "transformer.word_embeddings_layernorm",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}
# The published files were saved from the model without its head.
RENAMED = ((r"^(?=(h|word_embeddings|word_embeddings_layernorm|ln_f)\.)", "transformer."),)


def read(reader: Reader) -> ModelSpec:
    """`seq_length` is what the model was trained on; all published models on 2048 tokens."""
    reader.spelt(hidden_size="n_embed", num_hidden_layers="n_layer", num_attention_heads="n_head")
    reader.ignore(_EXECUTION + classic.PRECISION)
    reader.only("apply_residual_connection_post_layernorm", False)
    hidden, norm, heads = reader.size("hidden_size"), classic.read_norm(reader), classic.read_heads(reader)
    reader.only("n_inner", None, 4 * hidden)
    mixer = replace(classic.attention(heads), bias=Alibi(alibi_slopes(heads.heads)))
    layer = LayerSpec(mixer, Mlp(4 * hidden, "gelu_tanh", bias=True, gated=False), norm, norm)
    layers, limit = [layer] * common.read_layers(reader), reader.size("seq_length", 2048)
    return assemble(reader, layers, norm, limit, tied=True, embedding_norm=norm)


def source(wanted: Wanted) -> Value | str:
    name = common.named(wanted, "transformer.h.{}", _PARTS, _WHOLE)
    return fused_qkv(wanted, name, grouped=True) if classic.is_qkv(wanted) else name


FAMILY = Family("bloom", ("BloomForCausalLM",), read, source, (), RENAMED)
