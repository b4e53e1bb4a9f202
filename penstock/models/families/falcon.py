"""Falcon: one KV head (7B) or groups (40B, 11B, 180B), attention and feed-forward side by side on one norm or two; the
RefinedWeb models one behind the other, with biases and ALiBi. (Almazrouei et al. 2023.)"""

from __future__ import annotations

from dataclasses import replace

from penstock.ir import Value
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import classic
from penstock.models.families import decoder as common
from penstock.models.families.decoder import assemble
from penstock.models.registry import Family
from penstock.models.rope_config import read_rope
from penstock.models.storage import fused_qkv
from penstock.spec import Alibi, Attention, LayerSpec, ModelSpec, alibi_slopes

_WORDS = {
    "hidden_size": "n_embed",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_kv_heads": "n_head_kv",
    "intermediate_size": "ffn_hidden_size",
}
_PARTS = {
    **classic.qkv("self_attention.query_key_value"),
    "attention.o": "self_attention.dense",
    "feedforward.up": "mlp.dense_h_to_4h",
    "feedforward.down": "mlp.dense_4h_to_h",
}
_SERIAL = {"mixer_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm"}
_TWO = {"mixer_norm": "ln_attn", "feedforward_norm": "ln_mlp"}
_WHOLE = {"embedding": "transformer.word_embeddings", "final_norm": "transformer.ln_f", "head": "lm_head"}


def read(reader: Reader) -> ModelSpec:
    """Before the family was part of transformers, the new form was told by its `model_type`, RefinedWeb, alone."""
    reader.spelt(**_WORDS)
    reader.only("apply_residual_connection_post_layernorm", False)
    bias = reader.flag("bias", False)
    new = reader.flag("new_decoder_architecture", reader.get("model_type", None) == "RefinedWeb")
    parallel, norms = reader.flag("parallel_attn", True), reader.optional_size("num_ln_in_parallel_attn")
    if (new and not parallel) or (norms or 1) > (2 if new else 1):
        raise reader.refused("num_ln_in_parallel_attn", norms, "1, or 2 in the new form, which is parallel")
    mlp = classic.read_mlp(reader, "activation", "gelu", bias)
    reader.only("ff_factor", mlp.size // reader.size("hidden_size"))
    mixer, norm = _read_attention(reader, new, bias), classic.read_norm(reader)
    second = norm if not parallel or (new and norms != 1) else None
    layer = LayerSpec(mixer, mlp, norm, second, residual="parallel" if parallel else "serial")
    limit = reader.size("max_position_embeddings", 2048)
    return assemble(reader, [layer] * common.read_layers(reader), norm, limit, tied=True)


def _read_attention(reader: Reader, new: bool, bias: bool) -> Attention:
    """ALiBi goes before rotation, and is added before scores are scaled. Their code rounds it to bfloat16, ours not."""
    single, stated = reader.flag("multi_query", True), reader.optional_size("num_kv_heads")
    heads = classic.read_heads(reader, stated if new else 1 if single else None)
    rope = read_rope(reader, heads.head_dim, reader.size("max_position_embeddings", 2048))
    mixer = classic.attention(heads, rope, bias)
    if not reader.flag("alibi", False):
        return mixer
    return replace(mixer, rope=None, bias=Alibi(tuple(s * mixer.scale for s in alibi_slopes(heads.heads))))


def source(wanted: Wanted) -> Value | str:
    two = any(layer.residual == "parallel" and layer.feedforward_norm for layer in wanted.spec.layers)
    name = common.named(wanted, "transformer.h.{}", _PARTS | (_TWO if two else _SERIAL), _WHOLE)
    return fused_qkv(wanted, name, grouped=True) if classic.is_qkv(wanted) else name


FAMILY = Family("falcon", ("FalconForCausalLM", "RWForCausalLM"), read, source)
