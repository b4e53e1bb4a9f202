"""A decoder's spec to the graph of one ragged step, in plain ops only: fusing is the compiler's business."""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import chain

from penstock.engine.groups import BY_SLOT, CROSS
from penstock.ir import Graph, Type, Value, emit, leaf, tensor
from penstock.models.binding import Binding, mixer_name
from penstock.models.feedforward import feedforward
from penstock.models.mixers import cross, mix
from penstock.models.step import Frequencies, Inputs, Weights, group_of
from penstock.spec import AnyAttention, Attention, BySlot, EncoderSpec, LayerSpec, ModelSpec


def build_forward(
    spec: ModelSpec, binding: Binding, format: str, block_size: int, kv_format: str | None = None
) -> Graph:
    """The graph of a step: token rows of any mixture of prompts and decodes to the logits asked for.

    `format` is what activations are rounded to, `kv_format` what KV is; None: the same. Results: "logits", f32[L,V],
    and each layer's state under its own name. The states of layers of one class and size bear one group name, the
    attribute `group`, and read and write by the group's own block table. Without a head "logits" are the rows behind
    the final norm, f32[L,E]. What an encoder made for each layer, the graph
    of `models.encoder` has written; here it is only read.
    """
    inputs, weights = Inputs.of(spec), Weights(binding)
    own, seen = states_of(spec, format, kv_format or format, block_size)
    states, names = list(own), [value.node.name for value in chain(*own)]
    freqs, by_group = Frequencies(inputs), inputs.by_group([*chain(*own), *seen])

    def mixing(i: int, within: Weights) -> Mixing:
        def run(h: Value) -> Value:
            mixer, mine = spec.layers[i].mixer, by_group[group_of(states[i][0])]
            y, *after = mix(h, states[i], mixer, within.below(mixer_name(mixer)), mine, freqs)
            states[i] = tuple(after)
            return y

        return run

    def looking(i: int, within: Weights) -> Mixing | None:
        if (mixer := spec.layers[i].cross) is None:
            return None
        return lambda h: cross(h, seen[i], mixer, within.below("cross"), by_group[group_of(seen[i])])

    h = embed(spec, spec, weights, weights, inputs)
    for i, layer in enumerate(spec.layers):
        within = weights.below(f"layers.{i}")
        h = block(h, layer, within, mixing(i, within), looking(i, within))
    logits = _logits(emit("take_rows", h, inputs.logit_rows)[0], spec, weights)
    return Graph((logits, *chain(*states)), ("logits", *names))


def state_name(layer: int, part: str = "kv") -> str:
    """The name of a layer's state: of its leaf, its result, and its pool in a feed."""
    return f"layers.{layer}.{part}"


def states_of(
    spec: ModelSpec, format: str, kv_format: str, block_size: int
) -> tuple[list[tuple[Value, ...]], list[Value]]:
    """Each layer's own; and where there is an encoder, its keys and values for each layer. Groups are numbered in that
    order."""
    groups: dict[tuple[str | int, ...], str] = {}

    def paged(kind: str, mixer: AnyAttention, name: str) -> Value:
        size = (mixer.kv_heads, mixer.head_dim, mixer.window)
        group = groups.setdefault((kind, *size), f"{kind}{len(groups)}")
        parts = 2 if isinstance(mixer, Attention) else 1  # keys and values; or one of which both are made
        kv = tensor(kv_format, "N", parts, mixer.kv_heads, block_size, mixer.head_dim)
        return leaf("state", name, kv, group=group, **({"window": mixer.window} if mixer.window else {}))

    own: list[tuple[Value, ...]] = []
    for i, mixer in enumerate(layer.mixer for layer in spec.layers):
        if isinstance(mixer, BySlot):
            own.append(_by_slot(i, mixer, format, groups))
        else:
            own.append((paged("windowed" if mixer.window else "paged", mixer, state_name(i)),))
    crosses = [(i, layer.cross) for i, layer in enumerate(spec.layers) if layer.cross]
    return own, [paged(CROSS, mixer, state_name(i, "cross")) for i, mixer in crosses]


def _by_slot(i: int, mixer: BySlot, format: str, groups: dict[tuple[str | int, ...], str]) -> tuple[Value, ...]:
    """The last inputs of its convolution, as they came, and the state itself, in which errors would add up."""
    sizes = (mixer.channels, mixer.kernel, *mixer.kept)
    group = groups.setdefault((BY_SLOT, *sizes), f"{BY_SLOT}{len(groups)}")
    past = tensor(format, "N", mixer.channels, mixer.kernel - 1)
    state = tensor("f32", "N", *mixer.kept)
    parts = (("conv", past), ("state", state))
    return tuple(leaf("state", state_name(i, part), type, group=group) for part, type in parts)


def embed(spec: ModelSpec, stack: ModelSpec | EncoderSpec, weights: Weights, within: Weights, inputs: Inputs) -> Value:
    """[T,E], of the model's table, and what a `stack` of layers with its weights `within` does to it."""
    h = emit("embedding", inputs.tokens, weights["embedding.weight"])[0]
    if spec.embedding_scale != 1.0:
        h = emit("scale", h, factor=_rounded(spec.embedding_scale, h.type))[0]
    if spec.embedding_size:
        h = weights.linear(h, "project_in")
    if stack.learned_positions:
        h = emit("add", h, emit("embedding", inputs.positions, within["positions.weight"])[0])[0]
    return within.norm(h, "embedding_norm", stack.embedding_norm)


Mixing = Callable[[Value], Value]  # [T,E] -> [T,E]


def block(x: Value, spec: LayerSpec, weights: Weights, mixing: Mixing, looking: Mixing | None = None) -> Value:
    """A layer around its mixer, and the one that looks at an encoder: [T,E] -> [T,E]."""

    def mixed(h: Value) -> Value:
        return _scaled(weights.norm(mixing(h), "mixer_post_norm", spec.mixer_post_norm), spec)

    if spec.residual == "parallel":
        h = weights.norm(x, "mixer_norm", spec.mixer_norm)
        x, y = emit("add", x, mixed(h))[0], x
        h = weights.norm(y, "feedforward_norm", spec.feedforward_norm) if spec.feedforward_norm else h
        return emit("add", x, _forward(h, spec, weights))[0]
    x = _added(x, "mixer_norm", spec, weights, mixed)
    if looking is not None:
        x = _added(x, "cross_norm", spec, weights, looking)
    if spec.feedforward is None:
        return x
    return _added(x, "feedforward_norm", spec, weights, lambda h: _forward(h, spec, weights))


def _added(x: Value, norm: str, spec: LayerSpec, weights: Weights, part: Mixing) -> Value:
    """A part of the layer, with its norm, added to x."""
    if spec.residual == "post":
        return weights.norm(emit("add", x, part(x))[0], norm, getattr(spec, norm))
    return emit("add", x, part(weights.norm(x, norm, getattr(spec, norm))))[0]


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
    if not spec.head:
        return emit("widen", h)[0]
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
