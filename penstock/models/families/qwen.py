"""Qwen 1: fused q, k and v with biases, a gate stored behind what it gates. (Bai et al. 2023, arXiv:2309.16609.)"""

from __future__ import annotations

from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families.fused import fusing
from penstock.models.registry import Family
from penstock.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, Rope

_PARTS = {
    "attention.o": "attn.c_proj",
    "mixer_norm": "ln_1",
    "feedforward_norm": "ln_2",
    "feedforward.up": "mlp.w1",
    "feedforward.gate": "mlp.w2",
    "feedforward.down": "mlp.c_proj",
}
_WHOLE = {"embedding": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"}
_BUFFERS = (r"transformer\.(h\.\d+\.attn\.)?rotary_emb\.inv_freq", r"transformer\.h\.\d+\.attn\.masked_bias")


def read(reader: Reader) -> ModelSpec:
    """`use_dynamic_ntk` and `use_logn_attn` change what is computed from `seq_length` on, which is then the longest
    sequence; without both it is `max_position_embeddings`."""
    trained, limit = reader.size("seq_length"), reader.size("max_position_embeddings")
    if reader.flag("use_dynamic_ntk", True) | reader.flag("use_logn_attn", True):
        limit = trained
    reader.only("rotary_pct", 1.0)
    reader.only("scale_attn_weights", True)
    reader.ignore((
        "attn_dropout_prob", "bf16", "emb_dropout_prob", "fp16", "fp32", "onnx_safe", "softmax_in_fp32",
        "tokenizer_type", "use_cache_kernel",
    ))  # fmt: skip
    reader.only("use_cache_quantization", False)
    heads = common.read_heads(reader)
    reader.only("kv_channels", heads.head_dim)
    rope, norm = Rope(reader.number("rotary_emb_base", 10000.0), heads.head_dim), _norm(reader)
    bias, size = not reader.flag("no_bias", True), reader.size("intermediate_size")
    if size % 2:
        raise reader.refused("intermediate_size", size, "an even number: gate and what it gates have half of it each")
    mixer = Attention(heads.heads, heads.kv_heads, heads.head_dim, heads.head_dim**-0.5, rope, True, bias)
    layer = LayerSpec(mixer, Mlp(size // 2, "silu", bias), norm, norm)
    return common.assemble(reader, [layer] * common.read_layers(reader), norm, limit)


def _norm(reader: Reader) -> Norm:
    return Norm(reader.number("layer_norm_epsilon", 1e-6))


def _plain(wanted: Wanted) -> str:
    return common.named(wanted, "transformer.h.{}", _PARTS, _WHOLE)


FAMILY = Family("qwen", ("QWenLMHeadModel",), read, fusing(_plain, "transformer.h.{}.attn.c_attn"), _BUFFERS)
