"""An encoder's spec to the graph of its program: whole inputs to the keys and values that the decoder looks at."""

from __future__ import annotations

from functools import partial
from itertools import chain

from penstock.ir import Graph, Value
from penstock.models.binding import Binding
from penstock.models.decoder import block, embed, states_of
from penstock.models.mixers import bidirectional, filled
from penstock.models.step import Inputs, Weights, group_of
from penstock.spec import Attention, ModelSpec


def build_encoder(
    spec: ModelSpec, binding: Binding, format: str, block_size: int, kv_format: str | None = None
) -> Graph | None:
    """The graph of an encoder's run: token rows of several whole inputs, which begin at position 0, to the state of
    each decoder layer's `cross`, under its own name. None where the model has no encoder. Formats as `build_forward`.
    """
    encoder = spec.encoder
    if encoder is None:
        return None
    inputs, weights = Inputs.of(spec), Weights(binding)
    own, states = states_of(spec, format, kv_format or format, block_size)
    by_group, within = inputs.by_group([*chain(*own), *states]), weights.below("encoder")
    h = embed(spec, encoder, weights, within, inputs)
    for i, layer in enumerate(encoder.layers):
        assert isinstance(layer.mixer, Attention), "encoders attend"
        at = within.below(f"layers.{i}")
        h = block(h, layer, at, partial(bidirectional, spec=layer.mixer, weights=at.below("attention"), inputs=inputs))
    h = within.norm(h, "final_norm", encoder.final_norm)
    return Graph(
        tuple(_filled(h, state, i, spec, weights, by_group[group_of(state)]) for i, state in enumerate(states)),
        tuple(state.node.name for state in states),
    )


def _filled(h: Value, state: Value, i: int, spec: ModelSpec, weights: Weights, inputs: Inputs) -> Value:
    mixer = spec.layers[i].cross
    assert mixer is not None
    return filled(h, state, mixer, weights.below(f"layers.{i}.cross"), inputs)
