"""OLMo 2: norms of what is added alone, and of whole rows of q and k. (OLMo Team 2025, arXiv:2501.00656.)"""

from __future__ import annotations

from dataclasses import replace

from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.registry import Family
from penstock.spec import LayerSpec, Mlp, ModelSpec

_SOURCE = common.renaming({
    "mixer_post_norm": "post_attention_layernorm",
    "feedforward_post_norm": "post_feedforward_layernorm",
})  # fmt: skip


def read(reader: Reader) -> ModelSpec:
    limit, norm = reader.size("max_position_embeddings", 2048), common.read_norm(reader, default=1e-5)
    bias = reader.flag("attention_bias", False)
    heads = common.read_heads(reader)
    mixer = common.read_attention(reader, heads, limit, qkv_bias=bias, out_bias=bias, qk_norm=norm)
    mlp = Mlp(reader.size("intermediate_size"), reader.choice("hidden_act", common.SILU, "silu"))
    layer = LayerSpec(replace(mixer, qk_norm_over="row"), mlp, None, None, norm, norm)
    return common.assemble(reader, [layer] * common.read_layers(reader), norm, limit)


FAMILY = Family("olmo2", ("Olmo2ForCausalLM",), read, _SOURCE)
