"""Realistic inputs for timing and for kernel tests: what a step would really hand to an op, from a seeded generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.ir.graph import Type
from penstock.ir.lazy import torch


def example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    """Normal floats scaled so that sums stay near one; zeros for integers."""
    return [fill(t, sizes, generator, device) for t in types]


def fill(type: Type, sizes: Mapping[str, int], generator: Any, device: str) -> Any:
    """One tensor: weights (no run-time size in the shape) are scaled by 1/sqrt(last dimension)."""
    shape = type.concrete(sizes)
    dtype = getattr(torch, type.format.torch_dtype)
    if not type.format.is_float:
        return torch.zeros(shape, dtype=dtype, device=device)
    scale = 1.0 if type.symbols or len(shape) == 1 else shape[-1] ** -0.5
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)


def integers(low: int, high: int, shape: Sequence[int], generator: Any, device: str) -> Any:
    """Uniform int32 in [low, high)."""
    return torch.randint(low, max(high, low + 1), tuple(shape), generator=generator, device=device, dtype=torch.int32)


def ragged(sizes: Mapping[str, int], context: int, device: str) -> tuple[Any, Any, Any, Any, Any]:
    """A plausible step of T tokens over S sequences, with up to `context` tokens before each row's own.

    More tokens than sequences, up to FEW: a whole prompt beside some rows of single tokens. Beyond, rows are alike.
    A negative context (see `context_of`) says by how much the longest row is too long: rows are cut, and the tokens
    left over are padding, of row -1. Returns rows i32[T], positions i32[T], query_start i32[S], query_len i32[S],
    context_len i32[S].
    """
    tokens, sequences = sizes["T"], sizes["S"]
    base, extra = divmod(tokens, sequences)
    counts = [base + (i < extra) for i in range(sequences)]
    if beside := singles_beside(sizes):
        counts = [1] * beside + [tokens - beside] + [0] * (sequences - beside - 1)
    counts = [min(count, most_queries(sizes) + min(0, context)) for count in counts]
    query_len = torch.tensor(counts, dtype=torch.int32, device=device)
    query_start = (query_len.cumsum(0) - query_len).to(torch.int32)
    own = torch.repeat_interleave(torch.arange(sequences, device=device), query_len.long())
    before = torch.arange(sequences, device=device, dtype=torch.int32) % 7
    before = before.clamp_max(max(context, 0)) + max(context - 7, 0)
    if beside:
        before[beside] = 0
    positions = before[own] + torch.arange(len(own), device=device, dtype=torch.int32) - query_start[own]
    padding = (0, tokens - len(own))
    rows = torch.nn.functional.pad(own.to(torch.int32), padding, value=-1)
    return rows, torch.nn.functional.pad(positions, padding), query_start, query_len, before + query_len


CONTEXT = 1024  # tokens before a step's own that an example assumes, where block tables have room
FEW = 512  # tokens of a step that is taken for one short prompt among decoding rows


def most_queries(sizes: Mapping[str, int]) -> int:
    """Tokens of the longest row of an example."""
    tokens = sizes.get("T", 1)
    return tokens - beside if (beside := singles_beside(sizes)) else -(-tokens // sizes.get("S", 1))


def singles_beside(sizes: Mapping[str, int]) -> int:
    """Rows of single tokens that an example's one prompt has beside it; 0 where all rows are alike."""
    tokens, sequences = sizes.get("T", 1), sizes.get("S", 1)
    return sequences // 4 if sequences < tokens <= FEW else 0


def example_blocks(types: Sequence[Type], sizes: Mapping[str, int]) -> int:
    """Blocks, the dummy included, of a pool in which every sequence of an example has its own; or as many slots.

    The site's cache, [N,2,K,B,D], says how many tokens a block holds; without one there may be a state by slot.
    """
    block = next((int(t.shape[3]) for t in types if "N" in t.symbols and len(t.shape) == 5), 0)
    if not block:
        return sizes.get("S", 1)
    return 1 + sizes.get("S", 1) * min(sizes.get("M", 1), -(-(CONTEXT + most_queries(sizes)) // block))


def table(sizes: Mapping[str, int], generator: Any, device: str) -> Any:
    """Blocks in random order, no two alike but the dummies behind those that are used: i32[S,M]."""
    sequences, width = sizes["S"], sizes["M"]
    used = min(width, (sizes["N"] - 1) // sequences)
    order = torch.randperm(sequences * used, generator=generator, device=device).view(sequences, used) + 1
    return torch.nn.functional.pad(order, (0, width - used)).to(torch.int32)


def context_of(sizes: Mapping[str, int], block_size: int) -> int:
    """The context that an example may assume: what its own blocks hold, less the longest row; negative: too little."""
    used = min(sizes["M"], (sizes["N"] - 1) // sizes["S"])
    return min(CONTEXT, used * block_size - most_queries(sizes))
