"""Choosing the next token, with counter-based random numbers.

A draw is a function of (seed, position, token) alone, computed with 32-bit integer arithmetic that every device does
alike: a request's tokens depend neither on its neighbours nor on when it joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.ir.graph import Type, tensor
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.examples import fill, integers

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: spreads consecutive counters


def mix(x: Any) -> Any:
    """A 32-bit finaliser in int64 arithmetic (the constants are those of C. Wellons' `lowbias32`)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def uniform(seed: Any, position: Any, count: int) -> Any:
    """Draws in (0, 1): f32[L,count] for seed and position i32[L]. 23 bits and a half: float32 holds each exactly, and
    none is 0 or 1, whose logarithm the Gumbel noise could not use."""
    key = mix(mix(seed.long() & MASK) ^ ((position.long() * GOLDEN) & MASK))
    column = (torch.arange(count, device=seed.device) * GOLDEN) & MASK
    bits = mix(key[:, None] ^ mix(column)[None, :])
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def _sample(logits: Type, temperature: Type, top_k: Type, top_p: Type, min_p: Type, seed: Type, position: Type) -> Type:
    return tensor("i32", *logits.shape[:1])


def _example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    rows = sizes["L"]
    logits = fill(types[0], sizes, generator, device) * 3
    ones = torch.ones(rows, device=device)
    seeds = integers(0, 1 << 30, (rows,), generator, device)
    top_k = torch.full((rows,), 50, dtype=torch.int32, device=device)
    at = integers(0, 1000, (rows,), generator, device)
    return [logits, ones * 0.7, top_k, ones * 0.9, ones * 0.0, seeds, at]


@op(_sample, example=_example)
def sample(logits: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seed: Any, position: Any) -> Any:
    """One token for each row of logits: [L,V]; the rest [L]. Returns i32[L].

    temperature 0: the largest logit, the lowest id where two are equal. Otherwise, in Hugging Face's order: divide by
    the temperature; keep the top_k largest (0: all); of their softmax keep the smallest set of largest whose
    probabilities reach top_p; keep those at least min_p times as probable as the likeliest; draw by the Gumbel-max
    rule. Logits equal to the last one kept are kept too. A logit that is not a number counts as minus infinity.
    """
    logits = torch.where(logits.isnan(), -torch.inf, logits)
    greedy = temperature <= 0
    if not _asked(~greedy):
        return logits.argmax(-1)
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    kept = _keep_top_k(scaled, top_k) if _asked(top_k > 0) else scaled
    kept = _keep_top_p(kept, top_p) if _asked(top_p < 1) else kept
    kept = _keep_min_p(kept, min_p) if _asked(min_p > 0) else kept
    noise = -torch.log(-torch.log(uniform(seed, position, logits.shape[-1])))
    scores = torch.where(greedy[:, None], logits.float(), kept + noise)
    return scores.argmax(-1)


def _asked(rows: Any) -> bool:
    """Whether any row wants it: nobody's vocabulary is sorted in vain. On a GPU, which is not read back, always."""
    return rows.device.type != "cpu" or bool(rows.any())


def _keep_top_k(scaled: Any, top_k: Any) -> Any:
    vocabulary = scaled.shape[-1]
    count = torch.where(top_k <= 0, vocabulary, top_k.clamp(max=vocabulary)).long()
    floor = scaled.sort(-1, descending=True).values.gather(-1, count[:, None] - 1)
    return scaled.masked_fill(scaled < floor, -torch.inf)


def _keep_top_p(kept: Any, top_p: Any) -> Any:
    """Drop a token when those strictly above it already hold top_p of the probability."""
    ordered = kept.sort(-1, descending=True).values
    mass = ordered.softmax(-1)
    needed = (mass.cumsum(-1) - mass) < top_p[:, None]
    floor = ordered.masked_fill(~needed, torch.inf).amin(-1, keepdim=True)
    return torch.where((top_p < 1)[:, None] & (kept < floor), -torch.inf, kept)


def _keep_min_p(kept: Any, min_p: Any) -> Any:
    """The likeliest is always kept; log(0) is minus infinity, which keeps all."""
    floor = kept.amax(-1) + min_p.clamp(max=1).log()
    return kept.masked_fill(kept < floor[:, None], -torch.inf)
