"""How a model knows where a token stands: rotary embeddings with their scalings, or biases on the scores."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.spec.json import kind


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
    interleaved: bool = False  # pairs (2i, 2i + 1) turn together, instead of (i, i + dim/2)
    planar: bool = False  # two halves of `dim` each: one by the place in the prompt's prefix, one by that behind it

    @property
    def by_request(self) -> bool:
        """Whether the frequencies depend on the length that a request may reach, and so are fixed at its admission."""
        return isinstance(self.scaling, DynamicNtk | LongRope)


@kind
@dataclass(frozen=True, slots=True)
class Alibi:
    """A score falls by its head's slope for each position that the key lies behind. (Press et al. 2021.)"""

    slopes: tuple[float, ...]


@kind
@dataclass(frozen=True, slots=True)
class RelativeBias:
    """A learned bias on the scores, of `buckets` by the distance of query and key. (Raffel et al. 2020, T5.)

    The first half of the distances has a bucket each, the others share logarithmically up to `max_distance`. All layers
    of a stack read one table. In an encoder half of the buckets are for keys behind the query, which are as many.
    """

    buckets: int
    max_distance: int


def alibi_slopes(heads: int, most: float = 8.0) -> tuple[float, ...]:
    """Geometric slopes 2^(-most/n), ...; n is a power of two, and further heads take every second of 2n's. (ibid.)"""
    power = 1 << (heads.bit_length() - 1)
    first = [2 ** (-most * (i + 1) / power) for i in range(power)]
    return (*first, *(2 ** (-most * (2 * i + 1) / (2 * power)) for i in range(heads - power)))
