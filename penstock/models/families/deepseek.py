"""DeepSeek-V2 and V3: latent attention, many small experts chosen within groups, shared ones. (DeepSeek-AI 2024.)

The layer behind V3's last, which predicts further tokens (`num_nextn_predict_layers`), is not read.
"""

from __future__ import annotations

import math
from typing import Any

from penstock.ir import Value, emit
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families.experts import from_experts, read_router
from penstock.models.registry import Family
from penstock.models.rope_config import read_rope
from penstock.models.storage import part
from penstock.spec import Latent, LayerSpec, Mlp, ModelSpec, Moe, Rope, Router, Yarn

_PARTS = {
    "attention.q_down": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "feedforward.router": "mlp.gate",
    "feedforward.shared.gate": "mlp.shared_experts.gate_proj",
    "feedforward.shared.up": "mlp.shared_experts.up_proj",
    "feedforward.shared.down": "mlp.shared_experts.down_proj",
}


def read_v2(reader: Reader) -> ModelSpec:
    reader.assume(n_shared_experts=2, q_lora_rank=1536, first_k_dense_replace=0, routed_scaling_factor=1.0)
    method = reader.choice("topk_method", {"greedy": "", "group_limited_greedy": "groups"}, "greedy")
    reader.only("scoring_func", "softmax")
    reader.only("norm_topk_prob", False)
    groups = _groups(reader, 1) if method else {}
    return _read(reader, 2048, read_router(reader, 0.0, factor=_factor(reader), **groups), interleaved=True)


def read_v3(reader: Reader) -> ModelSpec:
    reader.assume(n_shared_experts=1, q_lora_rank=1536, first_k_dense_replace=3, routed_scaling_factor=2.5)
    reader.only("topk_method", "noaux_tc")
    reader.only("scoring_func", "sigmoid")
    renormalize = float(reader.flag("norm_topk_prob", True))
    facts: dict[str, Any] = {"score": "sigmoid", "correction": True, "factor": _factor(reader), **_groups(reader, 2)}
    interleaved = reader.flag("rope_interleave", True)
    return _read(reader, 4096, read_router(reader, renormalize, **facts), interleaved=interleaved)


def _factor(reader: Reader) -> float:
    return reader.number("routed_scaling_factor")


def _groups(reader: Reader, top: int) -> dict[str, int]:
    return {"groups": reader.size("n_group"), "kept_groups": reader.size("topk_group"), "group_top": top}


def _read(reader: Reader, limit: int, router: Router, *, interleaved: bool) -> ModelSpec:
    limit, norm = reader.size("max_position_embeddings", limit), common.read_norm(reader)
    act = reader.choice("hidden_act", common.SILU, "silu")
    size, shared = reader.size("moe_intermediate_size"), reader.optional_size("n_shared_experts")
    moe = Moe(router, Mlp(size, act), Mlp(size * shared, act) if shared else None)
    reader.only("mlp_bias", False)
    dense = Mlp(reader.size("intermediate_size"), act)
    first = reader.get("first_k_dense_replace")
    if type(first) is not int or first < 0:
        raise reader.refused("first_k_dense_replace", first, "a number of layers")
    reader.only("moe_layer_freq", 1)
    reader.ignore(("num_nextn_predict_layers", "ep_size", "aux_loss_alpha", "seq_aux", "n_group", "topk_group"))
    mixer = _latent(reader, limit, interleaved)
    parts = [dense if i < first else moe for i in range(common.read_layers(reader))]
    return common.assemble(reader, [LayerSpec(mixer, each, norm, norm) for each in parts], norm, limit)


def _latent(reader: Reader, limit: int, interleaved: bool) -> Latent:
    heads, turned, plain = map(reader.size, ("num_attention_heads", "qk_rope_head_dim", "qk_nope_head_dim"))
    reader.only("num_key_value_heads", heads, None)
    reader.only("head_dim", turned, None)
    reader.only("qk_head_dim", plain + turned, None)
    rope = read_rope(reader, turned, limit, interleaved=interleaved)
    return Latent(
        heads,
        rank=reader.size("kv_lora_rank"),
        plain=plain,
        value=reader.size("v_head_dim"),
        scale=(plain + turned) ** -0.5 * _temperature(rope) ** 2,
        rope=rope,
        query_rank=reader.optional_size("q_lora_rank") or 0,
        bias=reader.flag("attention_bias", False),
    )


def _temperature(rope: Rope) -> float:
    """YaRN's factor on queries and keys alike, which the model takes into the scale of the scores."""
    match rope.scaling:
        case Yarn(factor=factor, mscale_all_dim=mscale) if mscale and factor > 1:
            return 0.1 * mscale * math.log(factor) + 1.0
    return 1.0


def source(wanted: Wanted) -> str | Value:
    prefix, (name, _, kind) = f"model.layers.{wanted.layer}", wanted.part.rpartition(".")
    if wanted.part == "feedforward.correction":
        return f"{prefix}.mlp.gate.e_score_correction_bias"
    if name in _PARTS:
        return f"{prefix}.{_PARTS[name]}.{kind}"
    if name == "attention.q":
        return _turned_first(wanted, prefix)
    if name in ("attention.keys", "attention.values"):
        return _expanded(wanted, f"{prefix}.self_attn.kv_b_proj.weight", name)
    own = from_experts(wanted, f"{prefix}.mlp.experts", "gate_proj", "up_proj", "down_proj")
    return own or common.source(wanted)


def _turned_first(wanted: Wanted, prefix: str) -> Value:
    """Each head's rotated rows before its plain ones; the files have them behind."""
    mixer = _mixer(wanted)
    sizes, width = (mixer.plain, mixer.rope.dim), wanted.shape[1]
    name = f"{prefix}.self_attn.{'q_b_proj' if mixer.query_rank else 'q_proj'}.weight"
    heads = emit("reshape", wanted.tensor(name), shape=(mixer.heads, sum(sizes), width))[0]
    turned = emit("concat", part(heads, sizes, 1, dim=1), part(heads, sizes, 0, dim=1), dim=1)[0]
    return emit("reshape", turned, shape=wanted.shape)[0]


def _expanded(wanted: Wanted, name: str, half: str) -> Value:
    """A half of what expands latents to a head's plain keys and its values."""
    mixer = _mixer(wanted)
    sizes = (mixer.plain, mixer.value)
    whole = wanted.tensor(name, mixer.heads * sum(sizes), mixer.rank)
    heads = emit("reshape", whole, shape=(mixer.heads, sum(sizes), mixer.rank))[0]
    if half == "attention.values":
        return part(heads, sizes, 1, dim=1)
    return emit("transpose", part(heads, sizes, 0, dim=1))[0]


def _mixer(wanted: Wanted) -> Latent:
    mixer = wanted.spec.layers[wanted.layer].mixer
    assert isinstance(mixer, Latent)
    return mixer


_FURTHER = r"model\.layers\.61\..*"  # of all published models of V3's architecture that have one, the 62nd
FAMILIES = (
    Family("deepseek_v2", ("DeepseekV2ForCausalLM",), read_v2, source),
    Family("deepseek_v3", ("DeepseekV3ForCausalLM",), read_v3, source, (_FURTHER,)),
)
