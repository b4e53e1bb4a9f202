"""Attention over the paged cache, for any mixture of prompts and single tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.examples import context_of, fill, ragged, table

EXTRAS = ("slopes", "distances", "sinks")
QUERY_TILE = 8  # queries of one product; a query stands at position % QUERY_TILE in its tile, whatever the chunking


def _attention(
    q: Type, kv: Type, query_start: Type, query_len: Type, context_len: Type, block_table: Type, *given: Type,
    heads: int, scale: float, window: int = 0, softcap: float = 0.0, extras: tuple[str, ...] = (),
) -> Type:  # fmt: skip
    check_cache(q, kv, heads)
    _check_extras(given, extras, heads)
    return q


def check_cache(q: Type, kv: Type, heads: int) -> None:
    """Raises ValueError where [T,H*D] queries cannot look into [N,2,K,B,D]."""
    _, two, kv_heads, _, size = kv.shape
    if two != 2 or heads % int(kv_heads) or q.shape[-1] != heads * int(size):
        raise ValueError(f"{heads} heads do not fit queries of {q.shape[-1]} and a cache of {kv}")


def _check_extras(given: Sequence[Type], names: Sequence[str], heads: int) -> None:
    if tuple(names) != tuple(name for name in EXTRAS if name in names) or len(given) != len(names):
        raise ValueError(f"extras {tuple(names)} of {len(given)} inputs; known, in this order, are {EXTRAS}")
    for name, type in zip(names, given, strict=True):
        if str(type.format) != "f32" or type.shape[:1] != (heads,) or len(type.shape) != 1 + (name == "distances"):
            raise ValueError(f"{name} {type}, expected f32[{heads}{',R' if name == 'distances' else ''}]")


def _example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    block = int(types[1].shape[3])
    _, _, query_start, query_len, context_len = ragged(sizes, context_of(sizes, block), device)
    tensors = [fill(t, sizes, generator, device) for t in types[:2]]
    extras = example_extras(attrs.get("extras", ()), types[6:], generator, device)
    return [*tensors, query_start, query_len, context_len, table(sizes, generator, device), *extras]


def example_extras(names: Sequence[str], types: Sequence[Type], generator: Any, device: str) -> list[Any]:
    """Slopes as ALiBi has them for a power of 2 of heads (Press et al. 2022); the others of normal numbers."""
    out = [torch.randn(t.concrete({}), generator=generator, device=device) for t in types]
    for i, name in enumerate(names):
        if name == "slopes":
            count = len(out[i])
            out[i] = 2.0 ** (torch.arange(1, count + 1, device=device) * (-8 / count))
    return out


@op(_attention, example=_example)
def attention(
    q: Any, kv: Any, query_start: Any, query_len: Any, context_len: Any, block_table: Any, *given: Any,
    heads: int, scale: float, window: int = 0, softcap: float = 0.0, extras: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    """softmax(scale * q k^T, causal) v for each sequence; its keys and values were appended before.

    q: [T,H*D]; kv: [N,2,K,B,D] (0 keys, 1 values); query_start, query_len, context_len: i32[S], the last including the
    step's own tokens; block_table: i32[S,M]. `window` > 0: a query sees itself and the window - 1 before it.
    `softcap` > 0: scores become softcap * tanh(score / softcap). Rows of no sequence are zero. Returns [T,H*D].
    `extras` names what is `given`, in this order: "slopes" f32[H]: slope * (key position - query position) is added to
    the scores (ALiBi); "distances" f32[H,R]: so is distances[head, min(query - key, R - 1)] (T5's relative bias);
    "sinks" f32[H]: one more score of each head in the denominator, with no value behind it (gpt-oss).

    On a CPU a row's bits depend on that row alone: products have fixed shapes, sums run block by block in order, and
    the blocks that a chunk drags along behind a row's own position add exact zeros.
    """
    known = dict(zip(extras, given, strict=True))
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    spans = zip(query_start.tolist(), query_len.tolist(), context_len.tolist(), block_table, strict=True)
    for start, count, context, blocks in spans:
        if count:
            lowest = max(0, context - count - window + 1) // kv.shape[3] if window else 0
            keys, values = gathered(kv, blocks, lowest, context)
            for first, rows in query_tiles(context - count, count):
                tile = q[start + first : start + first + len(rows)].float().unflatten(-1, (heads, -1))
                y = attend_tile(tile, rows, lowest, keys, values, known, scale, window, softcap)
                out[start + first : start + first + len(rows)] = y.flatten(-2)
    return out


def gathered(kv: Any, blocks: Any, lowest: int, context: int) -> tuple[Any, Any]:
    """Keys and values of one sequence from its block `lowest` on, block by block: two tensors [n,K,B,D].

    Those below no query sees; they may be another's by now.
    """
    own = kv[blocks[lowest : -(-context // kv.shape[3])].long()].float()
    return own[:, 0], own[:, 1]


def query_tiles(position: int, count: int) -> Iterator[tuple[int, range]]:
    """The step's queries of one sequence in tiles aligned to absolute positions: (offset in the step, positions)."""
    end = position + count
    at = position
    while at < end:
        stop = min(end, at - at % QUERY_TILE + QUERY_TILE)
        yield at - position, range(at, stop)
        at = stop


def attend_tile(
    q: Any, rows: range, lowest: int, keys: Any, values: Any, extras: Mapping[str, Any],
    scale: float, window: int, softcap: float, length: int = 0, least: int = 0,
) -> Any:  # fmt: skip
    """q: [t,H,D] at positions `rows`, t <= QUERY_TILE; keys, values: [n,K,B,D] from block `lowest` on. Returns
    [t,H,D]. `length`: each query sees so many keys; 0: those up to its own, and the first `least` in any case.

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
    start = rows.start - lead - lowest * block
    for bias in _biases(extras, start, (kv_heads, group), n, block):
        scores = scores + bias
    scores = scores.masked_fill(_hidden(start, group, n, block, window, length, least, str(q.device)), -torch.inf)
    highest = scores.amax((0, 3), keepdim=True)
    if "sinks" in extras:
        sinks = extras["sinks"].repeat_interleave(QUERY_TILE).view(1, kv_heads, -1, 1)
        highest = torch.maximum(highest, sinks)
    weights = (scores - highest).exp()
    total = _in_order(weights.sum(-1, keepdim=True))
    if "sinks" in extras:
        total = total + (sinks - highest)[0].exp()
    y = _in_order(_products(weights, values)) / total  # [K,G*tile,D]
    y = y.unflatten(1, (group, QUERY_TILE)).permute(2, 0, 1, 3).flatten(1, 2)
    return y[lead : lead + len(rows)]


def _biases(
    extras: Mapping[str, Any], start: int, heads: tuple[int, int], blocks: int, block: int
) -> Iterator[Any]:  # fmt: skip
    """What slopes and distances add to the scores of a tile at `start`, counted from the first key: [n,K,G*tile,B]."""
    key = torch.arange(blocks * block).view(blocks, 1, block)
    apart = torch.arange(start, start + QUERY_TILE)[:, None] - key  # [n,tile,B]
    if "slopes" in extras:
        slopes = extras["slopes"].view(1, *heads, 1, 1)
        yield (-apart.to(slopes)[:, None, None] * slopes).flatten(2, 3)
    if "distances" in extras:
        table = extras["distances"]
        bias = table[:, apart.clamp(0, table.shape[1] - 1).to(table.device)]  # [H,n,tile,B]
        yield bias.transpose(0, 1).unflatten(1, heads).flatten(2, 3)


@lru_cache(maxsize=32)
def _hidden(
    start: int, group: int, blocks: int, block: int, window: int, length: int, least: int, device: str
) -> Any:  # fmt: skip
    """Which keys the queries of a tile at `start`, counted from the first key on, must not see: bool[n,1,G*tile,B].

    Every layer asks for the same.
    """
    at = torch.arange(start, start + QUERY_TILE, device=device).repeat(group)[:, None]
    key = torch.arange(blocks * block, device=device).view(blocks, 1, 1, block)
    if length:
        return (key >= length).expand(-1, -1, len(at), -1)
    if least:
        return key > at.clamp_min(least - 1)
    return (key > at) | (key <= at - window) if window else key > at


def _products(a: Any, b: Any) -> Any:
    """Batched product with the two leading dimensions as the batch."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _in_order(partials: Any) -> Any:
    """The sum over dimension 0, first to last, so that zeros at the end change no bit."""
    return partials.cumsum(0)[-1]
