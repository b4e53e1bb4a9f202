"""Latent attention: all heads share one compressed key, of which the values are a part. (DeepSeek-V2 2024, 2.1.)

The products that would expand the latent to each head's keys and values are moved to the queries and to the result, so
that the cache holds R + C numbers a token and no head is ever written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.attention import attend_tile, query_tiles
from penstock.ir.ops.examples import context_of, example, fill, ragged, table
from penstock.ir.ops.linear import linear
from penstock.ir.ops.state import narrowed


def _head_linear(x: Type, w: Type, *, keep: int = 0) -> Type:
    heads, rows, columns = (int(d) for d in w.shape)
    if x.shape[-1] != heads * (keep + columns):
        raise ValueError(f"{heads} heads of {keep} + {columns} do not make rows of {x.shape[-1]}")
    return Type((*x.shape[:-1], heads * (keep + rows)), x.format)


@op(_head_linear, example=example)
def head_linear(x: Any, w: Any, *, keep: int = 0) -> Any:
    """Each head times a matrix of its own, but for its first `keep` numbers. x: [T,H*(keep+I)], w: [H,O,I] ->
    [T,H*(keep+O)]."""
    heads = x.float().unflatten(-1, (w.shape[0], -1))
    turned = [linear(heads[..., h, keep:], w[h]) for h in range(w.shape[0])]
    return torch.cat([heads[..., :keep], torch.stack(turned, -2)], -1).flatten(-2)


def _append(kv: Type, key: Type, latent: Type, positions: Type, rows: Type, block_table: Type) -> Type:
    if kv.shape[1:3] != (1, 1) or kv.shape[4] != int(key.shape[-1]) + int(latent.shape[-1]):
        raise ValueError(f"keys of {key.shape[-1]} and latents of {latent.shape[-1]} do not fit a cache of {kv}")
    return kv


def _append_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    rows, positions, *_ = ragged(sizes, context_of(sizes, int(types[0].shape[3])), device)
    tensors = [fill(t, sizes, generator, device) for t in types[:3]]
    return [*tensors, positions, rows, table(sizes, generator, device)]


@op(_append, writes={0: 0}, example=_append_example)
def latent_append(kv: Any, key: Any, latent: Any, positions: Any, rows: Any, block_table: Any) -> Any:
    """Write each token's rotated key and latent side by side, as `kv_append` does.

    kv: [N,1,1,B,R+C], replaced in place; key: [T,R]; latent: [T,C]; positions, rows: i32[T]; block_table: i32[S,M].
    """
    live = (rows >= 0).nonzero()[:, 0]
    at, block = positions[live].long(), kv.shape[3]
    blocks = block_table[rows[live].long(), at // block].long()
    kv[blocks, 0, 0, at % block] = narrowed(torch.cat([key[live], latent[live]], -1), kv.dtype)
    return kv


def _attention(
    q: Type, kv: Type, query_start: Type, query_len: Type, context_len: Type, block_table: Type,
    *, heads: int, scale: float, rank: int,
) -> Type:  # fmt: skip
    width = int(kv.shape[4])
    if kv.shape[1:3] != (1, 1) or q.shape[-1] != heads * width or not 0 < rank <= width:
        raise ValueError(
            f"{heads} heads do not fit queries of {q.shape[-1]} and a cache of {kv} with latents of {rank}"
        )
    return Type((*q.shape[:-1], heads * rank), q.format)


def _example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    spans = ragged(sizes, context_of(sizes, int(types[1].shape[3])), device)[2:]
    return [*(fill(t, sizes, generator, device) for t in types[:2]), *spans, table(sizes, generator, device)]


@op(_attention, example=_example)
def latent_attention(
    q: Any, kv: Any, query_start: Any, query_len: Any, context_len: Any, block_table: Any,
    *, heads: int, scale: float, rank: int,
) -> Any:  # fmt: skip
    """`attention` in which every head sees the same keys, whose last `rank` numbers are the values too.

    q: [T,H*W]; kv: [N,1,1,B,W]; spans and table as in `attention`. Returns [T,H*rank].
    """
    out = torch.zeros((q.shape[0], heads * rank), dtype=torch.float32, device=q.device)
    spans = zip(query_start.tolist(), query_len.tolist(), context_len.tolist(), block_table, strict=True)
    for start, count, context, blocks in spans:
        if not count:
            continue
        keys = kv[blocks[: -(-context // kv.shape[3])].long()].float()[:, 0]  # [n,1,B,W]
        for first, rows in query_tiles(context - count, count):
            tile = q[start + first : start + first + len(rows)].float().unflatten(-1, (heads, -1))
            y = attend_tile(tile, rows, 0, keys, keys[..., -rank:], {}, scale, 0, 0.0)
            out[start + first : start + first + len(rows)] = y.flatten(-2)
    return out
