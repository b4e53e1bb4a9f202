"""Attention over the paged cache, for any mixture of prompts and single tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.examples import context_of, fill, ragged, table

QUERY_TILE = 8  # queries of one product; a query stands at position % QUERY_TILE in its tile, whatever the chunking


def _attention(
    q: Type, kv: Type, query_start: Type, query_len: Type, context_len: Type, block_table: Type,
    *, heads: int, scale: float, window: int = 0, softcap: float = 0.0,
) -> Type:  # fmt: skip
    _, two, kv_heads, _, size = kv.shape
    if two != 2 or heads % int(kv_heads) or q.shape[-1] != heads * int(size):
        raise ValueError(f"{heads} heads do not fit queries of {q.shape[-1]} and a cache of {kv}")
    return q


def _example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    block = int(types[1].shape[3])
    _, _, query_start, query_len, context_len = ragged(sizes, context_of(sizes, block), device)
    tensors = [fill(t, sizes, generator, device) for t in types[:2]]
    return [*tensors, query_start, query_len, context_len, table(sizes, generator, device)]


@op(_attention, example=_example)
def attention(
    q: Any, kv: Any, query_start: Any, query_len: Any, context_len: Any, block_table: Any,
    *, heads: int, scale: float, window: int = 0, softcap: float = 0.0,
) -> Any:  # fmt: skip
    """softmax(scale * q k^T, causal) v for each sequence; its keys and values were appended before.

    q: [T,H*D]; kv: [N,2,K,B,D] (0 keys, 1 values); query_start, query_len, context_len: i32[S], the last including the
    step's own tokens; block_table: i32[S,M]. `window` > 0: a query sees itself and the window - 1 before it.
    `softcap` > 0: scores become softcap * tanh(score / softcap). Rows of no sequence are zero. Returns [T,H*D].

    On a CPU a row's bits depend on that row alone: products have fixed shapes, sums run block by block in order, and
    the blocks that a chunk drags along behind a row's own position add exact zeros.
    """
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    spans = zip(query_start.tolist(), query_len.tolist(), context_len.tolist(), block_table, strict=True)
    for start, count, context, blocks in spans:
        if count:
            lowest = max(0, context - count - window + 1) // kv.shape[3] if window else 0
            keys, values = _gather(kv, blocks, lowest, context)
            for first, rows in _tiles(context - count, count):
                tile = q[start + first : start + first + len(rows)].float().unflatten(-1, (heads, -1))
                y = _tile(tile, rows, lowest, keys, values, scale, window, softcap)
                out[start + first : start + first + len(rows)] = y.flatten(-2)
    return out


def _gather(kv: Any, blocks: Any, lowest: int, context: int) -> tuple[Any, Any]:
    """Keys and values of one sequence from its block `lowest` on, block by block: two tensors [n,K,B,D].

    Those below no query sees; they may be another's by now.
    """
    own = kv[blocks[lowest : -(-context // kv.shape[3])].long()].float()
    return own[:, 0], own[:, 1]


def _tiles(position: int, count: int) -> Iterator[tuple[int, range]]:
    """The step's queries of one sequence in tiles aligned to absolute positions: (offset in the step, positions)."""
    end = position + count
    at = position
    while at < end:
        stop = min(end, at - at % QUERY_TILE + QUERY_TILE)
        yield at - position, range(at, stop)
        at = stop


def _tile(
    q: Any, rows: range, lowest: int, keys: Any, values: Any, scale: float, window: int, softcap: float
) -> Any:  # fmt: skip
    """q: [t,H,D] at positions `rows`, t <= QUERY_TILE; keys, values: [n,K,B,D] from block `lowest` on. Returns
    [t,H,D].

    Places of the tile without a query may see no key at all: theirs are numbers that nobody reads.
    """
    n, kv_heads, block, size = keys.shape
    lead = rows.start % QUERY_TILE
    full = torch.nn.functional.pad(q, (0, 0, 0, 0, lead, QUERY_TILE - lead - len(rows)))
    grouped = full.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, size)  # [1,K,G*tile,D]
    scores = _products(grouped.expand(n, -1, -1, -1), keys.transpose(-1, -2)) * scale  # [n,K,G*tile,B]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    group = scores.shape[2] // QUERY_TILE
    hidden = _hidden(rows.start - lead - lowest * block, group, n, block, window, str(q.device))
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = (scores - scores.amax((0, 3), keepdim=True)).exp()
    total = _in_order(weights.sum(-1, keepdim=True))
    y = _in_order(_products(weights, values)) / total  # [K,G*tile,D]
    y = y.unflatten(1, (group, QUERY_TILE)).permute(2, 0, 1, 3).flatten(1, 2)
    return y[lead : lead + len(rows)]


@lru_cache(maxsize=32)
def _hidden(start: int, group: int, blocks: int, block: int, window: int, device: str) -> Any:
    """Which keys the queries of a tile at `start`, counted from the first key on, must not see: bool[n,1,G*tile,B].

    Every layer asks for the same.
    """
    at = torch.arange(start, start + QUERY_TILE, device=device).repeat(group)[:, None]
    key = torch.arange(blocks * block, device=device).view(blocks, 1, 1, block)
    return (key > at) | (key <= at - window) if window else key > at


def _products(a: Any, b: Any) -> Any:
    """Batched product with the two leading dimensions as the batch."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _in_order(partials: Any) -> Any:
    """The sum over dimension 0, first to last, so that zeros at the end change no bit."""
    return partials.cumsum(0)[-1]
