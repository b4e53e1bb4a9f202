"""GLM-4: interleaved rope on half of each head, fused gate and up. (GLM Team 2024, arXiv:2406.12793.)

The later form, glm4, also normalises what is added.
"""

from __future__ import annotations

from functools import partial

from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families.fused import fusing
from penstock.models.registry import Family
from penstock.spec import LayerSpec, Mlp, ModelSpec

_UP = "model.layers.{}.mlp.gate_up_proj"
_NORMS = {"mixer_post_norm": "post_self_attn_layernorm", "feedforward_post_norm": "post_mlp_layernorm"}


def read(reader: Reader, post: bool) -> ModelSpec:
    limit, norm = reader.size("max_position_embeddings", 131072), common.read_norm(reader, default=1.5625e-7)
    bias, heads = reader.flag("attention_bias", True), common.read_heads(reader, kv_heads=2, head_dim=128)
    mixer = common.read_attention(reader, heads, limit, qkv_bias=bias, partial=0.5, interleaved=True)
    mlp = Mlp(reader.size("intermediate_size"), reader.choice("hidden_act", common.SILU, "silu"))
    layer = LayerSpec(mixer, mlp, norm, norm, *(norm, norm) if post else ())
    return common.assemble(reader, [layer] * common.read_layers(reader), norm, limit)


FAMILIES = (
    Family("glm", ("GlmForCausalLM",), partial(read, post=False), fusing(common.source, gate_up_name=_UP)),
    Family("glm4", ("Glm4ForCausalLM",), partial(read, post=True), fusing(common.renaming(_NORMS), gate_up_name=_UP)),
)
