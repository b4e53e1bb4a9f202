"""Attention of encoder-decoders: of an encoder over its own input, and of a decoder over what was made of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.attention import attend_tile, check_cache, gathered, query_tiles
from penstock.ir.ops.examples import context_of, fill, ragged, table


def _encoder_attention(
    q: Type, k: Type, v: Type, query_start: Type, query_len: Type, bias: Type | None = None, *, heads: int, scale: float
) -> Type:  # fmt: skip
    if q.shape[-1] != k.shape[-1] or k.shape != v.shape or int(q.shape[-1]) % heads:
        raise ValueError(f"queries {q}, keys {k} and values {v} do not fit {heads} heads")
    if bias is not None and (len(bias.shape) != 2 or bias.shape[0] != heads or not int(bias.shape[1]) % 2):
        raise ValueError(f"bias {bias}, expected f32[{heads},2R-1]")
    return q


def _encoder_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    _, _, query_start, query_len, _ = ragged(sizes, 0, device)
    qkv = [fill(t, sizes, generator, device) for t in types[:3]]
    return [*qkv, query_start, query_len, *(fill(t, sizes, generator, device) for t in types[5:])]


@op(_encoder_attention, example=_encoder_example)
def encoder_attention(
    q: Any, k: Any, v: Any, query_start: Any, query_len: Any, bias: Any = None, *, heads: int, scale: float
) -> Any:
    """softmax(scale * q k^T + bias) v for each sequence, whose tokens all see each other. Nothing is cached.

    q, k, v: [T,H*D]; query_start, query_len: i32[S]. bias: f32[H,2R-1], of the distance key - query, from -(R-1) to
    R - 1, beyond which it stays as it is (T5). Rows of no sequence are zero. Returns [T,H*D].
    """
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for start, count in zip(query_start.tolist(), query_len.tolist(), strict=True):
        if count:
            own = slice(start, start + count)
            out[own] = _each_sees_all(q[own], k[own], v[own], bias, heads, scale)
    return out


def _each_sees_all(q: Any, k: Any, v: Any, bias: Any, heads: int, scale: float) -> Any:
    """Of one sequence: [n,H*D] each and the result."""
    q, k, v = (x.float().unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(-1, -2)) * scale
    if bias is not None:
        at, most = torch.arange(q.shape[1], device=q.device), bias.shape[1] // 2
        scores = scores + bias[:, (at - at[:, None]).clamp(-most, most) + most]
    return torch.bmm(scores.softmax(-1), v).transpose(0, 1).flatten(-2)


def _cross_attention(
    q: Type, kv: Type, query_start: Type, query_len: Type, context_len: Type, encoder_len: Type, block_table: Type, *,
    heads: int, scale: float,
) -> Type:  # fmt: skip
    check_cache(q, kv, heads)
    return q


def _cross_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    """Every sequence looks at as many tokens as it could have before its own."""
    most = context_of(sizes, int(types[1].shape[3]))
    _, _, query_start, query_len, context_len = ragged(sizes, most, device)
    tensors = [fill(t, sizes, generator, device) for t in types[:2]]
    encoder_len = torch.full_like(query_len, max(1, most)) * (query_len > 0)
    return [*tensors, query_start, query_len, context_len, encoder_len, table(sizes, generator, device)]


@op(_cross_attention, example=_cross_example)
def cross_attention(
    q: Any, kv: Any, query_start: Any, query_len: Any, context_len: Any, encoder_len: Any, block_table: Any, *,
    heads: int, scale: float,
) -> Any:  # fmt: skip
    """softmax(scale * q k^T) v for each sequence, over all that an encoder made of its input.

    As `attention`, but each query sees the first `encoder_len` (i32[S]) places of its block table, and nothing is of
    the step's own tokens. q: [T,H*D]; kv: [N,2,K,B,D]. On a CPU a row's bits depend on that row alone.
    """
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lengths = (x.tolist() for x in (query_start, query_len, context_len, encoder_len))
    for start, count, context, length, blocks in zip(*lengths, block_table, strict=True):
        if count and length:
            keys, values = gathered(kv, blocks, 0, length)
            for first, rows in query_tiles(context - count, count):
                own = slice(start + first, start + first + len(rows))
                tile = q[own].float().unflatten(-1, (heads, -1))
                out[own] = attend_tile(tile, rows, 0, keys, values, {}, scale, 0, 0.0, length).flatten(-2)
    return out
