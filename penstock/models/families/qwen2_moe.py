"""Qwen1.5-MoE and Qwen2-MoE: small experts, and a shared one behind a gate. (Yang et al. 2024.)"""

from __future__ import annotations

from penstock.ir import Value
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families.experts import from_experts, read_router, sparse_layers
from penstock.models.registry import Family
from penstock.spec import LayerSpec, Mlp, ModelSpec, Moe, Router

_PARTS = {
    "feedforward.router": "mlp.gate",
    "feedforward.shared.gate": "mlp.shared_expert.gate_proj",
    "feedforward.shared.up": "mlp.shared_expert.up_proj",
    "feedforward.shared.down": "mlp.shared_expert.down_proj",
    "feedforward.shared_gate": "mlp.shared_expert_gate",
}


def read(reader: Reader) -> ModelSpec:
    """Windows are refused: published files state one and do not use it, and which layers would is not agreed upon."""
    limit, norm = reader.size("max_position_embeddings", 32768), common.read_norm(reader)
    bias = reader.flag("qkv_bias", True)
    mixer = common.read_attention(reader, common.read_heads(reader), limit, qkv_bias=bias)
    act = reader.choice("hidden_act", common.SILU, "silu")
    shared = Mlp(reader.size("shared_expert_intermediate_size", 5632), act)
    moe = Moe(_router(reader), Mlp(reader.size("moe_intermediate_size", 1408), act), shared, shared_gate=True)
    parts = sparse_layers(reader, Mlp(reader.size("intermediate_size"), act), moe)
    without_windows(reader, len(parts))
    return common.assemble(reader, [LayerSpec(mixer, part, norm, norm) for part in parts], norm, limit)


def _router(reader: Reader) -> Router:
    return read_router(reader, renormalize=float(reader.flag("norm_topk_prob", False)))


def without_windows(reader: Reader, layers: int) -> None:
    """Consume the keys of windows, which must not be used."""
    reader.only("use_sliding_window", False, None)
    reader.ignore(("sliding_window", "max_window_layers"))
    reader.only("layer_types", None, ["full_attention"] * layers)


def source(wanted: Wanted) -> str | Value:
    prefix, (part, _, kind) = f"model.layers.{wanted.layer}", wanted.part.rpartition(".")
    if part in _PARTS:
        return f"{prefix}.{_PARTS[part]}.{kind}"
    own = from_experts(wanted, f"{prefix}.mlp.experts", "gate_proj", "up_proj", "down_proj")
    return own or common.source(wanted)


FAMILY = Family("qwen2_moe", ("Qwen2MoeForCausalLM",), read, source)
