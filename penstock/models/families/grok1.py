"""Grok-1, as HPC-AI ported it to Hugging Face's format: four norms a layer, capped scores, scaled ends. (xAI 2024.)

The experts' gelu is the exact one, as in that port; xAI's own program takes the tanh form.
"""

from __future__ import annotations

from penstock.ir import Value
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families.experts import from_experts, read_router
from penstock.models.registry import Family
from penstock.models.rope_config import read_rope
from penstock.spec import Attention, LayerSpec, Mlp, ModelSpec, Moe

_PARTS = {
    "attention.q.weight": "attn.q_proj.weight",
    "attention.k.weight": "attn.k_proj.weight",
    "attention.v.weight": "attn.v_proj.weight",
    "attention.o.weight": "attn.o_proj.weight",
    "mixer_norm.weight": "pre_attn_norm.scale",
    "mixer_post_norm.weight": "post_attn_norm.scale",
    "feedforward_norm.weight": "pre_moe_norm.scale",
    "feedforward_post_norm.weight": "post_moe_norm.scale",
    "feedforward.router.weight": "moe_block.gate.weight",
}
_WHOLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.scale",
    "head.weight": "lm_head.weight",
}


def read(reader: Reader) -> ModelSpec:
    limit, norm = reader.size("max_position_embeddings", 8192), common.read_norm(reader, default=1e-5)
    heads = common.read_heads(reader)
    mixer = Attention(
        *(heads.heads, heads.kv_heads, heads.head_dim),
        scale=reader.number("attn_output_multiplier", 1.0),
        rope=read_rope(reader, heads.head_dim, limit),
        softcap=reader.number("max_attn_value", 30.0),
    )
    moe = Moe(read_router(reader, renormalize=0.0), Mlp(reader.size("intermediate_size"), "gelu"))
    layer = LayerSpec(mixer, moe, norm, norm, norm, norm)
    scales = {
        "embedding_scale": reader.number("embedding_multiplier_scale", 1.0),
        "logit_scale": reader.number("output_multiplier_scale", 1.0),
    }
    return common.assemble(reader, [layer] * common.read_layers(reader), norm, limit, tied=True, **scales)


def source(wanted: Wanted) -> str | Value:
    if wanted.layer < 0:
        return _WHOLE[wanted.part]
    prefix = f"model.layers.{wanted.layer}"
    own = from_experts(wanted, f"{prefix}.moe_block.experts", "linear", "linear_v", "linear_1")
    return own or f"{prefix}.{_PARTS[wanted.part]}"


FAMILY = Family("grok-1", ("Grok1ModelForCausalLM",), read, source)
