"""The parts of a layer: normalisations, token mixers and feed-forwards."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.spec.json import kind
from penstock.spec.position import Alibi, RelativeBias, Rope


@kind
@dataclass(frozen=True, slots=True)
class Norm:
    """Root-mean-square normalisation; the factor is the stored weight + `offset`."""

    eps: float
    offset: float = 0.0


@kind
@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Normalisation to mean zero and variance one, times a weight, and plus a bias where there is one."""

    eps: float
    bias: bool = True


AnyNorm = Norm | LayerNorm


@kind
@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention: H heads over K KV heads of D numbers."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of the scores
    rope: Rope | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: AnyNorm | None = None  # of q and k, before rotation
    window: int = 0  # a query sees itself and window - 1 before it; 0: all
    qk_norm_over: str = "head"  # "head": one weight for all heads; "heads": a weight each; "row": all heads as one row
    clip: float = 0.0  # q, k and v are limited to +-clip, before they are normalised; 0: they are not
    bias: Alibi | RelativeBias | None = None  # on the scores
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap)
    sinks: bool = False  # a learned logit a head takes its share of the softmax, and gives nothing
    gated: bool = False  # the heads times the sigmoid of one more product of the input
    prefix: bool = False  # the first tokens of a prompt, those before the one that begins the answer, see each other

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0, f"{self.heads} heads do not share {self.kv_heads} KV heads"
        assert not self.rope or self.rope.dim <= self.head_dim, f"{self.rope} exceeds heads of {self.head_dim}"
        assert self.qk_norm_over in ("head", "heads", "row"), self.qk_norm_over
        plain = not (self.window or self.bias or self.softcap or self.sinks)
        assert plain or not self.prefix, "no op attends to a prefix in that way"
        if (rope := self.rope) and rope.planar:
            assert self.prefix and rope == Rope(rope.theta, self.head_dim // 2, planar=True), rope


@kind
@dataclass(frozen=True, slots=True)
class Latent:
    """Latent attention: keys and values of H heads are products of one latent of C numbers. (DeepSeek-V2 2024, 2.1.)

    A head's query and key are `plain` numbers beside `rope.dim` rotated ones, the latter's key common to all heads.
    """

    heads: int
    rank: int  # C
    plain: int
    value: int  # numbers of a head's value
    scale: float  # of the scores
    rope: Rope
    query_rank: int = 0  # queries are made of a normalised latent of their own; 0: of the input itself
    eps: float = 1e-6  # of both latents' norms
    bias: bool = False  # of the products that lead to the latents and from the heads
    window: int = 0

    @property
    def kv_heads(self) -> int:
        return 1

    @property
    def head_dim(self) -> int:
        """Numbers of a token in the cache."""
        return self.rope.dim + self.rank


@kind
@dataclass(frozen=True, slots=True)
class StateSpace:
    """H heads of P numbers, each with a state of P x N that decays and is added to, behind a short convolution of all
    that enters it; its output is gated, then normalised. (Dao and Gu 2024, Mamba-2.)
    """

    heads: int
    head_dim: int  # P
    state: int  # N
    groups: int  # of heads that are written and read alike
    kernel: int  # inputs of the convolution, the token's own included
    act: str  # behind the convolution, and of the gate
    eps: float  # of the norm
    bias: bool = False  # of the products into and out of the mixer
    kernel_bias: bool = True
    least_step: float = 0.0
    most_step: float = 0.0  # 0: none

    @property
    def size(self) -> int:
        """Numbers of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: the heads, and what each group is written and read by."""
        return self.size + 2 * self.groups * self.state

    @property
    def kept(self) -> tuple[int, int, int]:
        """Sizes of the state."""
        return self.heads, self.head_dim, self.state


@kind
@dataclass(frozen=True, slots=True)
class DeltaNet:
    """H heads with a memory of K x V each, in which a token's key replaces what it finds by its value; behind a short
    convolution of queries, keys and values; its output is normalised, then gated. (Yang et al. 2024.)"""

    heads: int
    head_dim: int  # V
    key_heads: int  # of queries and keys, which heads share in equal parts
    key_dim: int  # K
    kernel: int  # inputs of the convolution, the token's own included
    act: str  # behind the convolution, and of the gate
    eps: float  # of the norm of each head

    @property
    def size(self) -> int:
        """Numbers of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return self.size + 2 * self.key_heads * self.key_dim

    @property
    def kept(self) -> tuple[int, int, int]:
        return self.heads, self.key_dim, self.head_dim


BySlot = StateSpace | DeltaNet  # what keeps a state of one size, however long the text
Mixer = Attention | Latent | BySlot
AnyAttention = Attention | Latent  # what keeps a cache of all that came before


@kind
@dataclass(frozen=True, slots=True)
class Mlp:
    """down(act(gate(x)) * up(x)), F numbers wide; without a gate down(act(up(x)))."""

    size: int
    act: str
    bias: bool = False
    gated: bool = True
    limit: float = 0.0  # of act "swiglu_clamped", on both of its operands; 0: none


@kind
@dataclass(frozen=True, slots=True)
class Router:
    """Which `chosen` of X experts a token goes to, and how much each counts.

    `score`: "softmax" of all logits, then the largest; "top_softmax": the largest, then their softmax; or "sigmoid".
    """

    experts: int
    chosen: int
    score: str = "softmax"
    renormalize: float = 0.0  # the chosen ones' weights are divided by their p-norm, p = 1 or 2; 0: left as they are
    factor: float = 1.0  # on the weights
    bias: bool = False  # of the router's product
    correction: bool = False  # a learned number is added to each score while experts are chosen
    groups: int = 0  # experts are chosen within the best `kept_groups` of so many groups; 0: among all
    kept_groups: int = 0
    group_top: int = 1  # a group's score is the sum of its largest so many


@kind
@dataclass(frozen=True, slots=True)
class Moe:
    """A mixture of experts: the sum of the chosen ones, each by its weight. (Shazeer et al. 2017.)"""

    router: Router
    expert: Mlp  # gated
    shared: Mlp | None = None  # one more that every token goes to
    shared_gate: bool = False  # the shared one times the sigmoid of a product of the token


FeedForward = Mlp | Moe
