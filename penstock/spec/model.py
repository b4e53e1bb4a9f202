"""What a model is: small frozen records that state facts about mathematics, never a model's name.

A record is hashable, and JSON is its printed form: `to_json` and `from_json` are exact inverses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.spec.json import dump, kind, load
from penstock.spec.layer import AnyAttention, AnyNorm, Attention, FeedForward, Mixer
from penstock.spec.position import Rope


@kind
@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A mixer and a feed-forward around the residual stream, by `residual`:

    "serial": x + s f(norm(x)), first the mixer, then the feed-forward; "parallel": both read the layer's x, and
    without a feedforward_norm the mixer's normalised one; "post": norm(x + s f(x)). A post_norm normalises what is
    added. `cross`: a second mixer between the two, which looks at what an encoder made of its input. Without a
    feed-forward a layer is its mixer alone.
    """

    mixer: Mixer
    feedforward: FeedForward | None
    mixer_norm: AnyNorm | None
    feedforward_norm: AnyNorm | None
    mixer_post_norm: AnyNorm | None = None
    feedforward_post_norm: AnyNorm | None = None
    residual: str = "serial"
    residual_scale: float = 1.0  # s
    cross: Attention | None = None
    cross_norm: AnyNorm | None = None

    def __post_init__(self) -> None:
        assert self.residual in ("serial", "parallel", "post"), self.residual
        assert self.feedforward or (self.residual == "serial" and not self.feedforward_norm), "nothing to normalise for"
        assert not (self.cross and self.residual == "parallel"), "nobody looks at an encoder in parallel"


@kind
@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """What reads a whole input before the decoder begins: layers in which every token sees all, over the decoder's own
    embedding."""

    layers: tuple[LayerSpec, ...]
    final_norm: AnyNorm | None
    embedding_norm: AnyNorm | None = None
    learned_positions: int = 0


@kind
@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder: embedding, layers, final norm, head; behind an encoder where it has one. Sizes in numbers, positions
    in tokens."""

    layers: tuple[LayerSpec, ...]
    vocab_size: int
    hidden_size: int
    final_norm: AnyNorm | None
    max_position: int  # the longest sequence, in tokens, that the model is meant for
    tied_head: bool = False  # the head's matrix is the embedding's
    embedding_scale: float = 1.0  # on the embedding; rounded to the model's format where it is applied
    embedding_norm: AnyNorm | None = None
    embedding_size: int = 0  # of table and head, where products lead to the hidden size and back; 0: the hidden size
    learned_positions: int = 0  # rows of a table that is added to the embedding; 0: none
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # logits become softcap * tanh(logit / softcap), after scaling
    encoder: EncoderSpec | None = None
    head: bool = True  # False: what the final norm gives is the result, and no weight of a head is read

    def __post_init__(self) -> None:
        assert self.head or not self.encoder, "what an encoder predicts for needs a head"
        assert all(bool(self.encoder) == bool(layer.cross) for layer in self.layers), "all layers look at it, or none"

    @property
    def result_size(self) -> int:
        """Numbers of a row of results: logits, or without a head the hidden size."""
        return self.vocab_size if self.head else self.embedding_size or self.hidden_size

    @property
    def attentions(self) -> list[AnyAttention]:
        """The mixers of the layers that attend."""
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, AnyAttention)]

    @property
    def window(self) -> int:
        """The widest of its layers' windows; 0 where a layer sees all."""
        windows = [mixer.window for mixer in self.attentions]
        return max(windows, default=0) if all(windows) else 0

    @property
    def request_rope(self) -> Rope | None:
        """The rope whose frequencies are fixed by request; None where all are constants of the model."""
        ropes = {rope for rope in (mixer.rope for mixer in self.attentions) if rope and rope.by_request}
        assert len(ropes) <= 1, "at most one rope of a model may depend on the request"
        return next(iter(ropes), None)

    def to_json(self) -> dict[str, Any]:
        """JSON values only; equal neighbouring layers are written once, with their count."""
        data: dict[str, Any] = dump(self)
        for stack in filter(None, (data, data["encoder"])):
            stack["layers"] = _runs(stack["layers"])
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_json`. Raises ModelError for what is no spec."""
        encoder = data.get("encoder")
        spec = load({**_unrolled(data), "encoder": _unrolled(encoder) if encoder else None})
        assert isinstance(spec, cls)
        return spec


def _unrolled(stack: dict[str, Any]) -> dict[str, Any]:
    return {**stack, "layers": [run["layer"] for run in stack.get("layers", ()) for _ in range(run["count"])]}


def _runs(layers: list[Any]) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    for layer in layers:
        if runs and runs[-1]["layer"] == layer:
            runs[-1]["count"] += 1
        else:
            runs.append({"count": 1, "layer": layer})
    return runs
