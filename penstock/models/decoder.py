"""A decoder's spec to the graph of one ragged step, in plain ops only: fusing is the compiler's business."""

from __future__ import annotations

import struct

from penstock.ir import Graph, Type, Value, emit, leaf, tensor
from penstock.models.binding import Binding
from penstock.models.feedforward import feedforward
from penstock.models.mixers import mix
from penstock.models.step import Frequencies, Inputs, Weights, group_of
from penstock.spec import Attention, LayerSpec, ModelSpec


def build_forward(
    spec: ModelSpec, binding: Binding, format: str, block_size: int, kv_format: str | None = None
) -> Graph:
    """The graph of a step: token rows of any mixture of prompts and decodes to the logits asked for.

    `format` is what activations are rounded to, `kv_format` what KV is; None: the same. Results: "logits", f32[L,V],
    and each layer's state under its own name. The states of layers of one class and size bear one group name, the
    attribute `group`, and read and write by the group's own block table.
    """
    inputs, states, weights = Inputs.of(spec), _states(spec, kv_format or format, block_size), Weights(binding)
    freqs, by_group = Frequencies(inputs), inputs.by_group(states)
    h = _embed(spec, weights, inputs)
    for i, layer in enumerate(spec.layers):
        own = by_group[group_of(states[i])]
        h, states[i] = _layer(h, states[i], layer, weights.below(f"layers.{i}"), own, freqs)
    logits = _logits(emit("take_rows", h, inputs.logit_rows)[0], spec, weights)
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
        parts = 2 if isinstance(mixer, Attention) else 1  # keys and values; or one of which both are made
        kv = tensor(format, "N", parts, mixer.kv_heads, block_size, mixer.head_dim)
        states.append(leaf("state", state_name(i), kv, group=group, **own))
    return states


def _embed(spec: ModelSpec, weights: Weights, inputs: Inputs) -> Value:
    h = emit("embedding", inputs.tokens, weights["embedding.weight"])[0]
    if spec.embedding_scale != 1.0:
        h = emit("scale", h, factor=_rounded(spec.embedding_scale, h.type))[0]
    if spec.embedding_size:
        h = weights.linear(h, "project_in")
    if spec.learned_positions:
        h = emit("add", h, emit("embedding", inputs.positions, weights["positions.weight"])[0])[0]
    return weights.norm(h, "embedding_norm", spec.embedding_norm)


def _layer(
    x: Value, kv: Value, spec: LayerSpec, weights: Weights, inputs: Inputs, freqs: Frequencies
) -> tuple[Value, Value]:
    post = spec.residual == "post"
    h = x if post else weights.norm(x, "mixer_norm", spec.mixer_norm)
    mixed, kv = mix(h, kv, spec.mixer, weights.below("attention"), inputs, freqs)
    mixed = _scaled(weights.norm(mixed, "mixer_post_norm", spec.mixer_post_norm), spec)
    if spec.residual == "parallel":
        h = weights.norm(x, "feedforward_norm", spec.feedforward_norm) if spec.feedforward_norm else h
        return emit("add", emit("add", x, mixed)[0], _forward(h, spec, weights))[0], kv
    x = emit("add", x, mixed)[0]
    if post:
        x = weights.norm(x, "mixer_norm", spec.mixer_norm)
        x = emit("add", x, _forward(x, spec, weights))[0]
        return weights.norm(x, "feedforward_norm", spec.feedforward_norm), kv
    h = weights.norm(x, "feedforward_norm", spec.feedforward_norm)
    return emit("add", x, _forward(h, spec, weights))[0], kv


def _forward(h: Value, spec: LayerSpec, weights: Weights) -> Value:
    """What a layer's feed-forward adds."""
    y = feedforward(h, spec.feedforward, weights.below("feedforward"))
    return _scaled(weights.norm(y, "feedforward_post_norm", spec.feedforward_post_norm), spec)


def _scaled(y: Value, spec: LayerSpec) -> Value:
    return y if spec.residual_scale == 1.0 else emit("scale", y, factor=spec.residual_scale)[0]


def _logits(h: Value, spec: ModelSpec, weights: Weights) -> Value:
    """[L,E] -> f32[L,V]."""
    h = weights.norm(h, "final_norm", spec.final_norm)
    if spec.embedding_size:
        h = weights.linear(h, "project_out")
    logits = weights.linear(h, "head", spec.head_bias, out="f32")
    if spec.logit_scale != 1.0:
        logits = emit("scale", logits, factor=spec.logit_scale)[0]
    return emit("softcap", logits, cap=spec.logit_softcap)[0] if spec.logit_softcap else logits


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
