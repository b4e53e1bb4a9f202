"""gpt-oss: sinks in the softmax, windows in every second layer, clamped experts, published in 4 bits. (OpenAI 2025.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from penstock.ir import Value, emit, leaf, tensor
from penstock.ir.ops.moe import CLAMPED
from penstock.models.binding import Source, Wanted
from penstock.models.config import Reader
from penstock.models.families import decoder as common
from penstock.models.families.experts import read_router
from penstock.models.registry import Family
from penstock.models.storage import part, transposed
from penstock.spec import Mlp, ModelSpec, Moe, Yarn

_NAMED = common.renaming({"feedforward.router": "mlp.router"})
_EXPERTS = {"feedforward.experts.in": "gate_up_proj", "feedforward.experts.out": "down_proj"}
_UNPACKED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
_GROUP = 32  # numbers that share a scale


def read(reader: Reader) -> ModelSpec:
    """The rope is read from the config alone: published files state it, and nobody's default is another's."""
    limit, norm = reader.size("max_position_embeddings", 131072), common.read_norm(reader, default=1e-5)
    bias = reader.flag("attention_bias", True)
    if reader.get("rope_parameters", None) is None:
        reader.get("rope_scaling")
    heads = common.read_heads(reader, kv_heads=8, head_dim=64)
    mixer = common.read_attention(reader, heads, limit, qkv_bias=bias, out_bias=bias, theta=150000.0)
    if mixer.rope and isinstance(mixer.rope.scaling, Yarn):
        reader.only("initial_context_length", mixer.rope.scaling.original)
    types = common.read_layer_types(reader, ("sliding_attention", "full_attention"))
    window = reader.size("sliding_window", 128)
    mixers = [replace(mixer, sinks=True, window=window if "sliding" in kind else 0) for kind in types]
    reader.only("hidden_act", "silu")
    expert = Mlp(reader.size("intermediate_size"), CLAMPED, bias=True, limit=reader.number("swiglu_limit", 7.0))
    router = read_router(reader, 0.0, score="top_softmax", bias=True)
    reader.only("experts_per_token", router.chosen)  # the same, as its first code calls it
    _check_packing(reader)
    return common.decoder(reader, mixers, Moe(router, expert), norm, limit)


def _check_packing(reader: Reader) -> None:
    stated = reader.nested("quantization_config")
    if stated is None:
        return
    stated.only("quant_method", "mxfp4")
    stated.ignore(("dequantize",))  # whether another library unpacks it when it loads
    left = stated.get("modules_to_not_convert", list(_UNPACKED)) or []
    if not isinstance(left, list) or not set(left) <= set(_UNPACKED):
        raise stated.refused("modules_to_not_convert", left, f"of {', '.join(_UNPACKED)}")
    stated.close()


def source(wanted: Wanted, packed: bool = False) -> str | Value:
    """`packed`: the experts' matrices are blocks of 4-bit numbers with a scale for each."""
    name, _, kind = wanted.part.rpartition(".")
    prefix = f"model.layers.{wanted.layer}"
    if name in _EXPERTS:
        stored = f"{prefix}.mlp.experts.{_EXPERTS[name]}"
        x = _matrices(wanted, stored, packed) if kind == "weight" else wanted.tensor(f"{stored}_bias")
        return _gates_first(x) if name.endswith("in") else x
    return f"{prefix}.self_attn.sinks" if wanted.part == "attention.sinks" else _NAMED(wanted)


def _matrices(wanted: Wanted, name: str, packed: bool) -> Value:
    count, rows, columns = wanted.shape
    if not packed:
        return transposed(wanted.tensor(name, count, columns, rows))
    shape = (count, rows, columns // _GROUP)
    blocks = leaf("tensor", f"{name}_blocks", tensor("u8", *shape, _GROUP // 2))
    return emit("mxfp4", blocks, leaf("tensor", f"{name}_scales", tensor("u8", *shape)), format=wanted.format)[0]


def _gates_first(x: Value) -> Value:
    """[X,2F,...] in which gate and up rows alternate -> first all gates."""
    count, rows, *rest = x.type.shape
    pairs = emit("reshape", x, shape=(count, int(rows) // 2, 2, *rest))[0]
    shape = (count, int(rows) // 2, *rest)
    halves = [emit("reshape", part(pairs, (1, 1), i, dim=2), shape=shape)[0] for i in range(2)]
    return emit("concat", *halves, dim=1)[0]


def stored(config: Mapping[str, Any]) -> Source:
    return partial(source, packed=bool(config.get("quantization_config")))


FAMILY = Family("gpt_oss", ("GptOssForCausalLM",), read, source, by_config=stored)
