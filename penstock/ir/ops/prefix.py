"""Models whose prompt has a prefix that sees all of itself, and in which places within and behind it are counted apart.

A sequence's `prefix_len`, i32[S], is the number of its first tokens that see each other; all others see what came
before them. (Du et al. 2022, GLM.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.attention import attend_tile, check_cache, gathered, query_tiles
from penstock.ir.ops.examples import context_of, fill, ragged, table
from penstock.ir.ops.position import example_freqs


def _prefix_rope(x: Type, positions: Type, freqs: Type, rows: Type, prefix_len: Type, *, heads: int) -> Type:
    width, turned = x.shape[-1], 4 * int(freqs.shape[-1])
    if freqs.shape[0] != 1 or width != heads * turned:
        raise ValueError(f"{heads} heads in rows of {width} are not two halves each, turned by {freqs}")
    return x


def _rope_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    rows, positions, _, query_len, context_len = ragged(sizes, 1024, device)
    prefix_len = _prefixes(query_len, context_len)
    return [
        fill(types[0], sizes, generator, device), positions, example_freqs(types[2], sizes, device), rows, prefix_len
    ]  # fmt: skip


def _prefixes(query_len: Any, context_len: Any) -> Any:
    """Of a plausible step: prompts up to their last token; of who decodes, half of what came before."""
    return torch.where(query_len > 1, context_len - 1, context_len // 2).to(torch.int32)


@op(_prefix_rope, example=_rope_example)
def prefix_rope(x: Any, positions: Any, freqs: Any, rows: Any, prefix_len: Any, *, heads: int) -> Any:
    """Rotate both halves of each head, in each the pairs (i, i + d/2) of its d = 2 * freqs.shape[1] numbers: the first
    by the place in the prefix, its last one for all that follows; the second by the place behind it, from 1; 0 in it.

    x: [T,H*2d]; positions: i32[T]; freqs, radians a place: f32[1,d/2]; rows: i32[T] naming each token's sequence (-1:
    padding); prefix_len: i32[S]. (Zeng et al. 2023, GLM-130B's two-dimensional positions.)
    """
    length = prefix_len[rows.long().clamp_min(0)]
    places = torch.stack([torch.minimum(positions, length - 1), (positions - length + 1).clamp_min(0)], -1)
    angle = (places.float()[..., None] * freqs[0].float())[:, None]  # [T,1,2,d/2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().unflatten(-1, (heads, 2, 2, -1)).unbind(-2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(1)


def _prefix_attention(
    q: Type, kv: Type, query_start: Type, query_len: Type, context_len: Type, prefix_len: Type, block_table: Type, *,
    heads: int, scale: float,
) -> Type:  # fmt: skip
    check_cache(q, kv, heads)
    return q


def _attention_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    _, _, query_start, query_len, context_len = ragged(sizes, context_of(sizes, int(types[1].shape[3])), device)
    tensors = [fill(t, sizes, generator, device) for t in types[:2]]
    prefix_len = _prefixes(query_len, context_len)
    return [*tensors, query_start, query_len, context_len, prefix_len, table(sizes, generator, device)]


@op(_prefix_attention, example=_attention_example)
def prefix_attention(
    q: Any, kv: Any, query_start: Any, query_len: Any, context_len: Any, prefix_len: Any, block_table: Any, *,
    heads: int, scale: float,
) -> Any:  # fmt: skip
    """softmax(scale * q k^T) v for each sequence, over the keys up to the query's own and over all of the prefix.

    As `attention` besides: keys and values were appended before, so a step that has a token of the prefix has all that
    the cache lacks of it. On a CPU a row's bits depend on that row and its prefix alone.
    """
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    spans = (x.tolist() for x in (query_start, query_len, context_len, prefix_len))
    for start, count, context, prefix, blocks in zip(*spans, block_table, strict=True):
        if count:
            keys, values = gathered(kv, blocks, 0, context)
            for first, rows in query_tiles(context - count, count):
                own = slice(start + first, start + first + len(rows))
                tile = q[own].float().unflatten(-1, (heads, -1))
                least = min(prefix, context)
                out[own] = attend_tile(tile, rows, 0, keys, values, {}, scale, 0, 0.0, least=least).flatten(-2)
    return out
