"""A decoder's spec to the graph of one ragged step, in plain ops only: fusing is the compiler's business."""

from __future__ import annotations

import struct
from itertools import chain

from penstock.engine.groups import BY_SLOT
from penstock.ir import Graph, Type, Value, emit, leaf, tensor
from penstock.models.binding import Binding, mixer_name
from penstock.models.feedforward import feedforward
from penstock.models.mixers import mix
from penstock.models.step import Frequencies, Inputs, Weights, group_of
from penstock.spec import Attention, BySlot, LayerSpec, ModelSpec


def build_forward(
    spec: ModelSpec, binding: Binding, format: str, block_size: int, kv_format: str | None = None
) -> Graph:
    """The graph of a step: token rows of any mixture of prompts and decodes to the logits asked for.

    `format` is what activations are rounded to, `kv_format` what KV is; None: the same. Results: "logits", f32[L,V],
    and each layer's state under its own name. The states of layers of one class and size bear one group name, the
    attribute `group`, and read and write by the group's own block table.
    """
    inputs, weights = Inputs.of(spec), Weights(binding)
    states = _states(spec, format, kv_format or format, block_size)
    names = [value.node.name for value in chain(*states)]
    freqs, by_group = Frequencies(inputs), inputs.by_group(chain(*states))
    h = _embed(spec, weights, inputs)
    for i, layer in enumerate(spec.layers):
        own = by_group[group_of(states[i][0])]
        h, states[i] = _layer(h, states[i], layer, weights.below(f"layers.{i}"), own, freqs)
    logits = _logits(emit("take_rows", h, inputs.logit_rows)[0], spec, weights)
    return Graph((logits, *chain(*states)), ("logits", *names))


def state_name(layer: int, part: str = "kv") -> str:
    """The name of a layer's state: of its leaf, its result, and its pool in a feed."""
    return f"layers.{layer}.{part}"


def _states(spec: ModelSpec, format: str, kv_format: str, block_size: int) -> list[tuple[Value, ...]]:
    """Of each layer."""
    groups: dict[tuple[int, ...], str] = {}
    states: list[tuple[Value, ...]] = []
    for i, mixer in enumerate(layer.mixer for layer in spec.layers):
        if isinstance(mixer, BySlot):
            states.append(_by_slot(i, mixer, format, groups))
            continue
        size = (mixer.kv_heads, mixer.head_dim, mixer.window)
        kind, own = ("windowed", {"window": mixer.window}) if mixer.window else ("paged", {})
        group = groups.setdefault(size, f"{kind}{len(groups)}")
        parts = 2 if isinstance(mixer, Attention) else 1  # keys and values; or one of which both are made
        kv = tensor(kv_format, "N", parts, mixer.kv_heads, block_size, mixer.head_dim)
        states.append((leaf("state", state_name(i), kv, group=group, **own),))
    return states


def _by_slot(i: int, mixer: BySlot, format: str, groups: dict[tuple[int, ...], str]) -> tuple[Value, ...]:
    """The last inputs of its convolution, as they came, and the state itself, in which errors would add up."""
    sizes = (mixer.channels, mixer.kernel, *mixer.kept)
    group = groups.setdefault(sizes, f"{BY_SLOT}{len(groups)}")
    past = tensor(format, "N", mixer.channels, mixer.kernel - 1)
    state = tensor("f32", "N", *mixer.kept)
    parts = (("conv", past), ("state", state))
    return tuple(leaf("state", state_name(i, part), type, group=group) for part, type in parts)


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
    x: Value, states: tuple[Value, ...], spec: LayerSpec, weights: Weights, inputs: Inputs, freqs: Frequencies
) -> tuple[Value, tuple[Value, ...]]:
    h = x if spec.residual == "post" else weights.norm(x, "mixer_norm", spec.mixer_norm)
    mixed, *after = mix(h, states, spec.mixer, weights.below(mixer_name(spec.mixer)), inputs, freqs)
    mixed = _scaled(weights.norm(mixed, "mixer_post_norm", spec.mixer_post_norm), spec)
    return _joined(x, h, mixed, spec, weights), tuple(after)


def _joined(x: Value, h: Value, mixed: Value, spec: LayerSpec, weights: Weights) -> Value:
    """The stream x, what the mixer made of h, and the feed-forward."""
    if spec.residual == "parallel":
        h = weights.norm(x, "feedforward_norm", spec.feedforward_norm) if spec.feedforward_norm else h
        return emit("add", emit("add", x, mixed)[0], _forward(h, spec, weights))[0]
    x = emit("add", x, mixed)[0]
    if spec.feedforward is None:
        return x
    if spec.residual == "post":
        x = weights.norm(x, "mixer_norm", spec.mixer_norm)
        x = emit("add", x, _forward(x, spec, weights))[0]
        return weights.norm(x, "feedforward_norm", spec.feedforward_norm)
    h = weights.norm(x, "feedforward_norm", spec.feedforward_norm)
    return emit("add", x, _forward(h, spec, weights))[0]


def _forward(h: Value, spec: LayerSpec, weights: Weights) -> Value:
    """What a layer's feed-forward adds."""
    assert spec.feedforward
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
