"""Qwen3-Next: three delta nets to a gated attention, mixtures of many small experts. (Qwen Team 2025.)"""

from __future__ import annotations

from dataclasses import replace

from penstock.ir import Value, emit
from penstock.models.binding import Wanted
from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families import qwen2_moe
from penstock.models.families.experts import read_router, sparse_layers
from penstock.models.registry import Family
from penstock.models.storage import by_group
from penstock.spec import DeltaNet, LayerSpec, Mixer, Mlp, ModelSpec, Moe

_PARTS = {
    "mixer.norm.weight": "norm.weight", "mixer.out.weight": "out_proj.weight", "mixer.decay": "A_log",
    "mixer.step_bias": "dt_bias",
}  # fmt: skip
_SPECULATION = r"mtp\..*"  # a layer that predicts one token more


def read(reader: Reader) -> ModelSpec:
    limit, norm = reader.size("max_position_embeddings", 32768), common.read_norm(reader, offset=1.0)
    act = reader.choice("hidden_act", common.SILU, "silu")
    bias = reader.flag("attention_bias", False)
    heads = common.read_heads(reader, kv_heads=2, head_dim=256)
    attention = common.read_attention(reader, heads, limit, qkv_bias=bias, out_bias=bias, qk_norm=norm, partial=0.25)
    reader.only("use_sliding_window", False, None)
    delta = _delta_net(reader, act, norm.eps)
    router = read_router(reader, float(reader.flag("norm_topk_prob", True)))
    shared = Mlp(reader.size("shared_expert_intermediate_size", 512), act)
    moe = Moe(router, Mlp(reader.size("moe_intermediate_size", 512), act), shared, shared_gate=True)
    parts = sparse_layers(reader, Mlp(reader.size("intermediate_size", 5632), act), moe)
    known: dict[str, Mixer] = {"full_attention": replace(attention, gated=True), "linear_attention": delta}
    mixers = [known[kind] for kind in _types(reader, len(parts))]
    layers = [LayerSpec(mixer, part, norm, norm) for mixer, part in zip(mixers, parts, strict=True)]
    return common.assemble(reader, layers, norm, limit)


def _types(reader: Reader, layers: int) -> list[str]:
    step = reader.size("full_attention_interval", 4)
    types = reader.get("layer_types", None)
    if types is None:
        return ["linear_attention" if (i + 1) % step else "full_attention" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or set(types) - {"linear_attention", "full_attention"}:
        raise reader.refused("layer_types", types, f"{layers} of linear_attention and full_attention")
    return types


def _delta_net(reader: Reader, act: str, eps: float) -> DeltaNet:
    most = common.MAX_HEAD_DIM
    keys, heads = reader.size("linear_num_key_heads", 16, most), reader.size("linear_num_value_heads", 32, most)
    if heads % keys:
        raise reader.refused("linear_num_value_heads", heads, f"a multiple of linear_num_key_heads = {keys}")
    sizes = (reader.size(f"linear_{part}_head_dim", 128, most) for part in ("value", "key"))
    value, key = sizes
    kernel = reader.size("linear_conv_kernel_dim", 4, 64)
    if kernel < 2:
        raise reader.refused("linear_conv_kernel_dim", kernel, "at least 2")
    return DeltaNet(heads, value, keys, key, kernel, act, eps)


def source(wanted: Wanted) -> str | Value:
    name, _, kind = wanted.part.rpartition(".")
    prefix = f"model.layers.{wanted.layer}"
    if wanted.part in _PARTS:
        return f"{prefix}.linear_attn.{_PARTS[wanted.part]}"
    if name == "mixer.conv":
        channels, width = wanted.shape
        stored = wanted.tensor(f"{prefix}.linear_attn.conv1d.weight", channels, 1, width)
        return emit("reshape", stored, shape=wanted.shape)[0]
    if name == "mixer.in":
        return _entering(wanted, f"{prefix}.linear_attn")
    if name in ("attention.q", "attention.gate"):
        both = wanted.tensor(f"{prefix}.self_attn.q_proj.{kind}", 2 * wanted.shape[0], *wanted.shape[1:])
        size = wanted.attention.head_dim
        return by_group(both, wanted.attention.heads, (size, size), int(name.endswith("gate")))
    return qwen2_moe.source(wanted)


def _entering(wanted: Wanted, prefix: str) -> Value:
    """Queries, keys, values and gates lie by key head in one tensor, what is replaced and the step in another."""
    mixer, hidden = wanted.spec.layers[wanted.layer].mixer, wanted.spec.hidden_size
    assert isinstance(mixer, DeltaNet)
    share = mixer.heads // mixer.key_heads
    sizes = (mixer.key_dim, mixer.key_dim, share * mixer.head_dim, share * mixer.head_dim)
    first = wanted.tensor(f"{prefix}.in_proj_qkvz.weight", mixer.key_heads * sum(sizes), hidden)
    steps = wanted.tensor(f"{prefix}.in_proj_ba.weight", 2 * mixer.heads, hidden)
    parts = [by_group(first, mixer.key_heads, sizes, i) for i in range(4)]
    parts += [by_group(steps, mixer.key_heads, (share, share), i) for i in range(2)]
    return emit("concat", *parts, dim=0)[0]


FAMILY = Family("qwen3_next", ("Qwen3NextForCausalLM",), read, source, (_SPECULATION,))
