"""DBRX: fine-grained experts, norms without bias, clipped and fused queries, keys and values. (Databricks 2024.)"""

from __future__ import annotations

from penstock.ir import Value, emit
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families.classic import is_qkv, qkv
from penstock.models.families.experts import MAX_EXPERTS
from penstock.models.registry import Family
from penstock.models.storage import fused_qkv
from penstock.spec import Attention, LayerNorm, LayerSpec, Mlp, ModelSpec, Moe, Rope, Router

_WORDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "max_seq_len",
}
_LAYER = "transformer.blocks.{}"
_PARTS = {
    **qkv("norm_attn_norm.attn.Wqkv"),
    "mixer_norm": "norm_attn_norm.norm_1",
    "feedforward_norm": "norm_attn_norm.norm_2",
    "attention.o": "norm_attn_norm.attn.out_proj",
    "feedforward.router": "ffn.router.layer",
}
_WHOLE = {"embedding": "transformer.wte", "final_norm": "transformer.norm_f", "head": "lm_head"}


def read(reader: Reader) -> ModelSpec:
    """Sizes bear names of their own, and attention and feed-forward have objects of their own."""
    reader.spelt(**_WORDS)
    hidden, limit = reader.size("hidden_size"), reader.size("max_position_embeddings")
    norm = LayerNorm(1e-5, bias=False)
    reader.ignore(("emb_pdrop", "router_aux_loss_coef", "output_router_logits"))
    layer = LayerSpec(_attention(reader, hidden), _moe(reader), norm, norm)
    return common.assemble(reader, [layer] * common.read_layers(reader), norm, limit)


def _attention(reader: Reader, hidden: int) -> Attention:
    heads, own = reader.size("num_attention_heads"), common.object_of(reader, "attn_config")
    kv, new = own.size("kv_n_heads", 1), reader.nested("rope_parameters")
    if hidden % heads or heads % kv:
        raise reader.refused(
            "num_attention_heads", heads, f"a divisor of d_model = {hidden} and a multiple of kv_n_heads = {kv}"
        )
    reader.only("num_key_value_heads", kv)  # written beside it by transformers from 5 on
    theta = own.optional_number("rope_theta") or (new.optional_number("rope_theta") if new else None) or 10000.0
    if new:
        new.only("rope_type", "default")
        new.close()
    clip, size = own.optional_number("clip_qkv") or 0.0, hidden // heads
    own.ignore((*common.OBJECT_KEYS, "attn_pdrop"))
    own.close()
    return Attention(heads, kv, size, size**-0.5, Rope(theta, size), clip=clip)


def _moe(reader: Reader) -> Moe:
    own = common.object_of(reader, "ffn_config")
    act = common.object_of(own, "ffn_act_fn", {"name": "silu"})
    expert = Mlp(own.size("ffn_hidden_size", 3584), act.choice("name", common.SILU))
    act.close()
    experts, chosen = own.size("moe_num_experts", 4, MAX_EXPERTS), own.size("moe_top_k", 1)
    if chosen > experts:
        raise own.refused("moe_top_k", chosen, f"at most moe_num_experts = {experts}")
    own.assume(moe_normalize_expert_weights=1.0)
    power = own.optional_number("moe_normalize_expert_weights") or 0.0
    if power not in (0.0, 1.0, 2.0):
        raise own.refused("moe_normalize_expert_weights", power, "null, 1 or 2")
    own.ignore((*common.OBJECT_KEYS, "moe_jitter_eps", "moe_loss_weight", "uniform_expert_assignment", "hidden_size"))
    own.close()
    return Moe(Router(experts, chosen, renormalize=power), expert)


def source(wanted: Wanted) -> str | Value:
    name = wanted.part.rpartition(".")[0]
    if name.startswith("feedforward.experts"):
        return _experts(wanted, f"{_LAYER.format(wanted.layer)}.ffn.experts.mlp", name)
    stored = common.named(wanted, _LAYER, _PARTS, _WHOLE)
    return fused_qkv(wanted, stored) if is_qkv(wanted) else stored


def _experts(wanted: Wanted, prefix: str, name: str) -> Value:
    """Each of w1 (gate), v1 (up) and w2 (the transposed way down) holds all experts below one another."""
    moe, hidden = wanted.spec.layers[wanted.layer].feedforward, wanted.spec.hidden_size
    assert isinstance(moe, Moe)
    count, size = moe.router.experts, moe.expert.size

    def whole(name: str) -> Value:
        return emit("reshape", wanted.tensor(f"{prefix}.{name}", count * size, hidden), shape=(count, size, hidden))[0]

    if name.endswith(".in"):
        return emit("concat", whole("w1"), whole("v1"), dim=1)[0]
    return emit("transpose", whole("w2"))[0]


FAMILY = Family("dbrx", ("DbrxForCausalLM",), read, source)
