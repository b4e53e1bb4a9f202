"""What a model is: small frozen records that state facts about mathematics, never a model's name.

A record is hashable, and JSON is its printed form: `to_json` and `from_json` are exact inverses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.spec.json import dump, kind, load


@kind
@dataclass(frozen=True, slots=True)
class Linear:
    """Positions are divided by `factor`. (Chen et al. 2023, position interpolation.)"""

    factor: float


@kind
@dataclass(frozen=True, slots=True)
class DynamicNtk:
    """The base grows with the length, once it exceeds `original` positions. (bloc97 and emozilla 2023.)"""

    factor: float
    original: int


@kind
@dataclass(frozen=True, slots=True)
class Llama3:
    """Long wavelengths are stretched, short ones kept, with a smooth border. (Grattafiori et al. 2024, Llama 3.1.)"""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original: int


@kind
@dataclass(frozen=True, slots=True)
class Yarn:
    """Interpolation by parts, and a temperature on attention. (Peng et al. 2023, arXiv:2309.00071.)

    `attention` is the factor on cosine and sine where the model states it; None derives it from the rest.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention: float | None = None


@kind
@dataclass(frozen=True, slots=True)
class LongRope:
    """A searched divisor for each frequency: one list up to `original` positions, one beyond. (Ding et al. 2024.)"""

    factor: float
    original: int
    short: tuple[float, ...]
    long: tuple[float, ...]
    attention: float | None = None


Scaling = Linear | DynamicNtk | Llama3 | Yarn | LongRope


@kind
@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of the first `dim` numbers of each head. (Su et al. 2021.)"""

    theta: float
    dim: int
    scaling: Scaling | None = None

    @property
    def by_request(self) -> bool:
        """Whether the frequencies depend on the length that a request may reach, and so are fixed at its admission."""
        return isinstance(self.scaling, DynamicNtk | LongRope)


@kind
@dataclass(frozen=True, slots=True)
class Norm:
    """Root-mean-square normalisation; the factor is the stored weight + `offset`."""

    eps: float
    offset: float = 0.0


@kind
@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention with rotary positions: H heads over K KV heads of D numbers."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of the scores
    rope: Rope
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None  # over each head of q and k, before rotation
    window: int = 0  # a query sees itself and window - 1 before it; 0: all

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0, f"{self.heads} heads do not share {self.kv_heads} KV heads"
        assert self.rope.dim <= self.head_dim, f"rope of {self.rope.dim} exceeds heads of {self.head_dim}"


@kind
@dataclass(frozen=True, slots=True)
class Mlp:
    """down(act(gate(x)) * up(x)), F numbers wide."""

    size: int
    act: str
    bias: bool = False


@kind
@dataclass(frozen=True, slots=True)
class LayerSpec:
    """x + mixer(norm(x)), then x + feedforward(norm(x))."""

    mixer: Attention
    feedforward: Mlp
    mixer_norm: Norm
    feedforward_norm: Norm


@kind
@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder: embedding, layers, final norm, head."""

    layers: tuple[LayerSpec, ...]
    vocab_size: int
    hidden_size: int
    final_norm: Norm
    max_position: int  # the longest sequence, in tokens, that the model is meant for
    tied_head: bool = False  # the head's matrix is the embedding's
    embedding_scale: float = 1.0  # on the embedding; rounded to the model's format where it is applied

    @property
    def window(self) -> int:
        """The widest of its layers' windows; 0 where a layer sees all."""
        windows = [layer.mixer.window for layer in self.layers]
        return max(windows) if all(windows) else 0

    @property
    def request_rope(self) -> Rope | None:
        """The rope whose frequencies are fixed by request; None where all are constants of the model."""
        ropes = {layer.mixer.rope for layer in self.layers if layer.mixer.rope.by_request}
        assert len(ropes) <= 1, "at most one rope of a model may depend on the request"
        return next(iter(ropes), None)

    def to_json(self) -> dict[str, Any]:
        """JSON values only; equal neighbouring layers are written once, with their count."""
        data: dict[str, Any] = dump(self)
        data["layers"] = _runs(data["layers"])
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_json`. Raises ModelError for what is no spec."""
        layers = [run["layer"] for run in data.get("layers", ()) for _ in range(run["count"])]
        spec = load({**data, "layers": layers})
        assert isinstance(spec, cls)
        return spec


def _runs(layers: list[Any]) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    for layer in layers:
        if runs and runs[-1]["layer"] == layer:
            runs[-1]["count"] += 1
        else:
            runs.append({"count": 1, "layer": layer})
    return runs
