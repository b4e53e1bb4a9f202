"""MPT: ALiBi, no biases, perhaps limited or normalised queries and keys. (MosaicML NLP Team 2023.)"""

from __future__ import annotations

from penstock.ir import Value
from penstock.models.binding import Wanted
from penstock.models.config import Reader, close
from penstock.models.families import classic
from penstock.models.families import decoder as common
from penstock.models.families.decoder import assemble
from penstock.models.registry import Family
from penstock.models.storage import fused_qkv
from penstock.spec import Alibi, Attention, LayerNorm, LayerSpec, Mlp, ModelSpec, alibi_slopes

_WORDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_seq_len",
}
# The start and progress of training, and notes; with ALiBi there are no learned positions, whatever the config says.
_NOTES = ("embedding_fraction", "init_config", "init_device", "learned_pos_emb", "tokenizer_name", "verbose")
_PARTS = {
    **classic.qkv("attn.Wqkv"),
    "attention.q_norm": "attn.q_ln",
    "attention.k_norm": "attn.k_ln",
    "attention.o": "attn.out_proj",
    "mixer_norm": "norm_1",
    "feedforward_norm": "norm_2",
    "feedforward.up": "ffn.up_proj",
    "feedforward.down": "ffn.down_proj",
}
_WHOLE = {"embedding": "transformer.wte", "final_norm": "transformer.norm_f", "head": "lm_head"}


def read(reader: Reader) -> ModelSpec:
    reader.spelt(**_WORDS)
    reader.ignore(_NOTES + classic.TRAINING)
    reader.choice("norm_type", {"low_precision_layernorm": "", "layernorm": ""}, "low_precision_layernorm")
    hidden, limit = reader.size("hidden_size"), reader.size("max_position_embeddings", 2048)
    bias = not reader.flag("no_bias", True)
    norm = classic.read_norm(reader, bias=bias)
    mixer = _read_attention(reader, norm, bias)
    mlp = Mlp(hidden * reader.size("expansion_ratio", 4, 64), "gelu", bias, gated=False)
    scale = reader.get("logit_scale", None)
    factor = hidden**-0.5 if scale == "inv_sqrt_d_model" else reader.optional_number("logit_scale") or 1.0
    layers = [LayerSpec(mixer, mlp, norm, norm)] * common.read_layers(reader)
    return assemble(reader, layers, norm, limit, tied=True, logit_scale=factor)


def _read_attention(reader: Reader, norm: LayerNorm, bias: bool) -> Attention:
    heads, own = classic.read_heads(reader), reader.nested("attn_config") or Reader({})
    own.ignore(("attn_impl",))
    own.only("attn_type", "multihead_attention")
    own.only("alibi", True)
    for key in ("attn_uses_sequence_id", "prefix_lm", "rope"):
        own.only(key, False)
    slopes = alibi_slopes(heads.heads, own.number("alibi_bias_max", 8))
    mixer = Attention(
        heads.heads, heads.heads, heads.head_dim, own.optional_number("softmax_scale") or heads.head_dim**-0.5,
        qkv_bias=bias, out_bias=bias, qk_norm=norm if own.flag("qk_ln", False) else None, qk_norm_over="row",
        clip=own.optional_number("clip_qkv") or 0.0, bias=Alibi(slopes),
    )  # fmt: skip
    close(own)
    return mixer


def source(wanted: Wanted) -> Value | str:
    name = common.named(wanted, "transformer.blocks.{}", _PARTS, _WHOLE)
    return fused_qkv(wanted, name) if classic.is_qkv(wanted) else name


FAMILY = Family("mpt", ("MptForCausalLM", "MPTForCausalLM"), read, source)
