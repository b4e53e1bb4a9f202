"""GPT-NeoX and Pythia: attention and feed-forward side by side, a part of each head rotated. (Black et al. 2022.)"""

from __future__ import annotations

from penstock.ir import Value
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import classic
from penstock.models.families import decoder as common
from penstock.models.families.decoder import assemble
from penstock.models.registry import Family
from penstock.models.rope_config import read_rope
from penstock.models.storage import fused_qkv
from penstock.spec import LayerSpec, ModelSpec

_PARTS = {
    **classic.qkv("attention.query_key_value"),
    "attention.o": "attention.dense",
    "mixer_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm",
    "feedforward.up": "mlp.dense_h_to_4h",
    "feedforward.down": "mlp.dense_4h_to_h",
}
_WHOLE = {"embedding": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "head": "embed_out"}
_BUFFERS = rf"gpt_neox\.layers\.\d+\.({classic.MASKS}|attention\.rotary_emb\.inv_freq)"


def read(reader: Reader) -> ModelSpec:
    reader.spelt(rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct")
    reader.ignore(classic.TRAINING)
    limit, norm = reader.size("max_position_embeddings", 2048), classic.read_norm(reader, "layer_norm_eps")
    heads = classic.read_heads(reader)
    rope = read_rope(reader, heads.head_dim, limit, partial=0.25)
    mixer = classic.attention(heads, rope, reader.flag("attention_bias", True))
    residual = "parallel" if reader.flag("use_parallel_residual", True) else "serial"
    layer = LayerSpec(mixer, classic.read_mlp(reader, "hidden_act", "gelu"), norm, norm, residual=residual)
    return assemble(reader, [layer] * common.read_layers(reader), norm, limit)


def source(wanted: Wanted) -> Value | str:
    name = common.named(wanted, "gpt_neox.layers.{}", _PARTS, _WHOLE)
    return fused_qkv(wanted, name, grouped=True) if classic.is_qkv(wanted) else name


FAMILY = Family("gpt_neox", ("GPTNeoXForCausalLM",), read, source, (_BUFFERS,))
