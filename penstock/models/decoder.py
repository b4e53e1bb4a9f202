"""A decoder's spec to the graph of one ragged step, in plain ops only: fusing is the compiler's business."""

from __future__ import annotations

import struct

from penstock.ir import Graph, Type, Value, emit, leaf, tensor
from penstock.models.binding import Binding
from penstock.models.feedforward import mlp
from penstock.models.mixers import attention
from penstock.models.step import Frequencies, Inputs, Weights, group_of
from penstock.spec import LayerSpec, ModelSpec, Norm


def build_forward(
    spec: ModelSpec, binding: Binding, format: str, block_size: int, kv_format: str | None = None
) -> Graph:
    """The graph of a step: token rows of any mixture of prompts and decodes to the logits asked for.

    `format` is what activations are rounded to, `kv_format` what KV is; None: the same. Results: "logits", f32[L,V],
    and each layer's state under its own name. The states of layers of one class and size bear one group name, the
    attribute `group`, and read and write by the group's own block table.
    """
    inputs, states = Inputs.of(spec), _states(spec, kv_format or format, block_size)
    freqs, by_group = Frequencies(inputs), inputs.by_group(states)
    h = _embed(spec, binding, inputs)
    for i, layer in enumerate(spec.layers):
        own = by_group[group_of(states[i])]
        h, states[i] = _layer(h, states[i], layer, Weights(binding, f"layers.{i}"), own, freqs)
    h = emit("take_rows", h, inputs.logit_rows)[0]
    h = _norm(h, spec.final_norm, binding["final_norm.weight"])
    logits = emit("linear", h, binding["head.weight"], out="f32")[0]
    return Graph((logits, *states), ("logits", *map(state_name, range(len(states)))))


def state_name(layer: int) -> str:
    """The name of a layer's KV state: of its leaf, its result, and its pool in a feed."""
    return f"layers.{layer}.kv"


def _states(spec: ModelSpec, format: str, block_size: int) -> list[Value]:
    groups: dict[tuple[int, int, int], str] = {}
    states = []
    for i, mixer in enumerate(layer.mixer for layer in spec.layers):
        size = (mixer.kv_heads, mixer.head_dim, mixer.window)
        kind, own = ("windowed", {"window": mixer.window}) if mixer.window else ("paged", {})
        group = groups.setdefault(size, f"{kind}{len(groups)}")
        kv = tensor(format, "N", 2, mixer.kv_heads, block_size, mixer.head_dim)
        states.append(leaf("state", state_name(i), kv, group=group, **own))
    return states


def _embed(spec: ModelSpec, binding: Binding, inputs: Inputs) -> Value:
    h = emit("embedding", inputs.tokens, binding["embedding.weight"])[0]
    if spec.embedding_scale == 1.0:
        return h
    return emit("scale", h, factor=_rounded(spec.embedding_scale, h.type))[0]


def _layer(
    h: Value, kv: Value, spec: LayerSpec, weights: Weights, inputs: Inputs, freqs: Frequencies
) -> tuple[Value, Value]:
    own = Weights(weights.binding, f"{weights.prefix}.attention")
    x = _norm(h, spec.mixer_norm, weights["mixer_norm.weight"])
    mixed, kv = attention(x, kv, spec.mixer, own, inputs, freqs[spec.mixer.rope])
    h = emit("add", h, mixed)[0]
    x = _norm(h, spec.feedforward_norm, weights["feedforward_norm.weight"])
    own = Weights(weights.binding, f"{weights.prefix}.feedforward")
    return emit("add", h, mlp(x, spec.feedforward, own))[0], kv


def _norm(x: Value, spec: Norm, weight: Value) -> Value:
    return emit("rms_norm", x, weight, eps=spec.eps, offset=spec.offset)[0]


def _rounded(factor: float, type: Type) -> float:
    """A constant as a tensor of this format would hold it: models multiply by the rounded one."""
    match type.format.name:
        case "f16":
            return float(struct.unpack("<e", struct.pack("<e", factor))[0])
        case "bf16":
            bits = int(struct.unpack("<I", struct.pack("<f", factor))[0])
            bits += 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
            return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])
    return float(struct.unpack("<f", struct.pack("<f", factor))[0])
