"""Mixtures of experts: which experts a token goes to, and their feed-forwards. k: experts of one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.ir.graph import Type, tensor
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.examples import fill
from penstock.ir.ops.linear import linear
from penstock.ir.ops.pointwise import ACTIVATIONS, activation

SCORES = ("softmax", "top_softmax", "sigmoid")
CLAMPED = "swiglu_clamped"
TINY = 1e-20  # added to a norm, so that weights which are all zero stay zero


def _route(
    scores: Type, bias: Type | None = None, *, chosen: int, score: str = "softmax", renormalize: float = 0.0,
    groups: int = 0, kept_groups: int = 0, group_top: int = 1, factor: float = 1.0,
) -> tuple[Type, Type]:  # fmt: skip
    experts = int(scores.shape[-1])
    if scores.format.name != "f32" or (bias is not None and bias != tensor("f32", experts)):
        raise ValueError("scores are f32[T,X], the bias f32[X]")
    if score not in SCORES:
        raise ValueError(f"score {score!r} is not one of {', '.join(SCORES)}")
    if bias is not None and score == "top_softmax":
        raise ValueError("a bias for choosing has no meaning with top_softmax, whose scores are raw")
    if renormalize not in (0, 1, 2):
        raise ValueError(f"renormalize {renormalize} is not 0 (no), 1 (by the sum) or 2 (by the root of squares)")
    if groups:
        size, rest = divmod(experts, groups)
        if rest or not 0 < kept_groups <= groups or group_top not in (1, 2) or group_top > size:
            raise ValueError(f"{kept_groups} of {groups} groups by their best {group_top} do not fit {experts} experts")
        experts = kept_groups * size
    elif kept_groups:
        raise ValueError(f"kept_groups {kept_groups} without groups")
    if not 0 < chosen <= experts:
        raise ValueError(f"cannot choose {chosen} of {experts} experts")
    return tuple(tensor(f, *scores.shape[:-1], chosen) for f in ("i32", "f32"))  # type: ignore[return-value]


def _route_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    scores, *bias = (fill(t, sizes, generator, device) for t in types)
    return [scores, *(0.1 * b for b in bias)]


@op(_route, example=_route_example)
def route(
    scores: Any, bias: Any = None, *, chosen: int, score: str = "softmax", renormalize: float = 0.0,
    groups: int = 0, kept_groups: int = 0, group_top: int = 1, factor: float = 1.0,
) -> tuple[Any, Any]:  # fmt: skip
    """The `chosen` experts of each token, best first, and their weights. scores: f32[T,X]; bias: f32[X].

    score: "softmax" of all scores, "sigmoid" of each, or "top_softmax" of the chosen ones alone. The best are chosen by
    score + bias (the weight leaves the bias out), the lower index where two are equal; a score that is not a number
    counts as minus infinity. groups: experts come in so many groups, and only those of the kept_groups best count, a
    group being as good as the sum of its best group_top. Weights are divided by their sum (renormalize 1) or the root
    of the sum of their squares (2), then multiplied by factor. Returns (i32[T,k], f32[T,k]). (Mixtral, Jiang et al.
    2024; DeepSeek-V3 2024, eq. 12-16; groups as in DeepSeek-V2 2024, 2.1.2.)
    """
    scores = scores.float()
    values = (
        scores if score == "top_softmax" else 1 / (1 + torch.exp(-scores)) if score == "sigmoid" else scores.softmax(-1)
    )
    # Softmax and sigmoid grow with their scores, which rounding leaves further apart.
    by = scores if bias is None and group_top == 1 else values if bias is None else values + bias.float()
    by = torch.where(by.isnan(), -torch.inf, by)
    experts = _best(_within_groups(by, groups, kept_groups, group_top) if groups else by, chosen)
    weights = values.gather(-1, experts)
    if score == "top_softmax":
        weights = weights.softmax(-1)
    if renormalize:
        weights = weights / (weights.norm(renormalize, -1, keepdim=True) + TINY)
    return experts.to(torch.int32), weights * factor


def _best(by: Any, count: int) -> Any:
    """Indices of the largest, the lower one where two are equal."""
    return by.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _within_groups(by: Any, groups: int, kept: int, top: int) -> Any:
    """Minus infinity outside the best groups. Within them the least is finite, so that none outside is chosen."""
    by = by.clamp_min(torch.finfo(torch.float32).min).unflatten(-1, (groups, -1))
    best = _best(by.topk(top, -1).values.sum(-1), kept)
    inside = torch.zeros(by.shape[:-1], dtype=torch.bool, device=by.device).scatter(-1, best, True)
    return by.masked_fill(~inside[..., None], -torch.inf).flatten(-2)


def _moe(
    x: Type, experts: Type, weights: Type, w_in: Type, w_out: Type, b_in: Type | None = None, b_out: Type | None = None,
    *, act: str, limit: float = 0.0, alpha: float = 1.702,
) -> Type:  # fmt: skip
    (count, wide, width), hidden = w_in.shape, w_out.shape[-1]
    if wide != 2 * int(hidden) or w_out.shape != (count, width, hidden) or x.shape[-1] != width:
        raise ValueError("w_in is [X,2F,E] and w_out [X,E,F] for rows of E")
    if experts.shape != weights.shape or experts.shape[:-1] != x.shape[:-1]:
        raise ValueError("every row has as many experts as weights")
    if (b_in is None) != (b_out is None) or (
        b_in and b_out and (b_in.shape, b_out.shape) != ((count, wide), (count, width))
    ):
        raise ValueError("biases are both or neither: [X,2F] and [X,E]")
    if act not in (*ACTIVATIONS, CLAMPED):
        raise ValueError(f"activation {act!r} is not one of {', '.join((*ACTIVATIONS, CLAMPED))}")
    if (limit > 0) != (act == CLAMPED):
        raise ValueError(f"limit {limit} with activation {act!r}: {CLAMPED} alone has one, above zero")
    return x


def _moe_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    """Every expert is as likely as any other."""
    x, _, _, *operands = (fill(t, sizes, generator, device) for t in types)
    shape = types[1].concrete(sizes)
    scores = torch.randn((*shape[:-1], int(types[3].shape[0])), generator=generator, device=device)
    return [x, *route(scores, chosen=shape[-1], renormalize=1.0), *operands]


@op(_moe, example=_moe_example)
def moe(
    x: Any, experts: Any, weights: Any, w_in: Any, w_out: Any, b_in: Any = None, b_out: Any = None,
    *, act: str, limit: float = 0.0, alpha: float = 1.702,
) -> Any:  # fmt: skip
    """The sum over a token's experts, in their order, of weight * (w_out @ gated(w_in @ x + b_in) + b_out).

    x: [T,E]; experts: i32[T,k]; weights: f32[T,k]; w_in: [X,2F,E], gate rows first; w_out: [X,E,F]; b_in: [X,2F];
    b_out: [X,E]. gated: act(gate) * up, or for act "swiglu_clamped", of gates up to `limit` and ups within +-limit,
    gate * sigmoid(alpha * gate) * (up + 1) (gpt-oss, 2025). Returns [T,E].
    """
    k, own = experts.shape[-1], experts.flatten()
    each = torch.empty((len(own), w_out.shape[1]), dtype=torch.float32, device=x.device)
    for e in own.unique().tolist():
        at = (own == e).nonzero()[:, 0]
        h = gated(linear(x[at // k], w_in[e], None if b_in is None else b_in[e]), act, limit, alpha)
        each[at] = linear(h, w_out[e], None if b_out is None else b_out[e])
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for i in range(k):
        y = y + weights[:, i, None].float() * each[i::k]
    return y


def gated(x: Any, act: str, limit: float, alpha: float) -> Any:
    """The left half of each row, activated, times the right half."""
    gate, up = x.chunk(2, -1)
    if act != CLAMPED:
        return activation(gate, act) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)
