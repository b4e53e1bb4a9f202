"""Attention of encoder-decoders and over prefixes: ragged inputs, biases, single tokens over long inputs, padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from penstock.engine.program import Site
from penstock.ir.graph import tensor
from penstock.ir.op import get
from tests.kernels.cases.attention import FP8, Sizes, _site, sizes


def encoder_attention(format: str, heads: int, size: int, distances: int = 0, scale: float = 0.0) -> Site:
    rows, x = tensor("i32", "S"), tensor(format, "T", heads * size)
    bias = (tensor("f32", heads, 2 * distances - 1),) if distances else ()
    return _site("encoder_attention", x, x, x, rows, rows, *bias, heads=heads, scale=scale or size**-0.5)


def cross_attention(format: str, heads: int, kv_heads: int, size: int, block: int = 64, pool: str = "") -> Site:
    kv, rows = tensor(pool or format, "N", 2, kv_heads, block, size), (tensor("i32", "S"),) * 4
    operands = tensor(format, "T", heads * size), kv, *rows, tensor("i32", "S", "M")
    return _site("cross_attention", *operands, heads=heads, scale=size**-0.5)


def prefix_attention(format: str, heads: int, kv_heads: int, size: int, block: int = 64, pool: str = "") -> Site:
    return replace(cross_attention(format, heads, kv_heads, size, block, pool), op="prefix_attention")


def prefix_rope(format: str, heads: int, size: int) -> Site:
    by_token, x = tensor("i32", "T"), tensor(format, "T", heads * size)
    return _site("prefix_rope", x, by_token, tensor("f32", 1, size // 4), by_token, tensor("i32", "S"), heads=heads)


# Tokens of each sequence, and what each looks at; laid over a case's S and T as far as they fit.
QUERIES = ((1, 9, 0, 30, 3), (1, 1, 1, 1, 1, 1), (40, 5), (17, 16, 1))
INPUTS = (70, 1, 64, 33, 128, 16, 7)


def examples(site: Site, sizes: Sizes, generator: Any) -> Iterator[list[Any]]:
    """The op's own example, then mixtures, with padding behind them and rows of nothing."""
    example = get(site.op).example
    assert example is not None
    device = str(generator.device)
    base = list(example(site.inputs, dict(site.attrs), sizes, generator, device))
    yield base
    if site.op == "prefix_rope":
        return
    at = 3 if site.op == "encoder_attention" else 2
    for lengths in QUERIES:
        counts: list[int] = []
        for n in lengths[: sizes["S"]]:
            counts.append(min(n, sizes["T"] - sum(counts)))
        counts += [0] * (sizes["S"] - len(counts))
        count = torch.tensor(counts, dtype=torch.int32, device=device)
        spans = [(count.cumsum(0) - count).to(torch.int32) * (count > 0), count]
        rest = base[at + 2 :]
        if site.op == "cross_attention":
            room = sizes["M"] * int(site.inputs[1].shape[3])
            lengths = tuple(min(room, INPUTS[i % len(INPUTS)]) for i in range(sizes["S"]))
            seen = torch.tensor(lengths, dtype=torch.int32, device=device)
            rest = [count + 5 * (count > 0), seen * (count > 0), base[6]]
        if site.op == "prefix_attention":  # of prompts, of chunks behind a prefix, and of what a step has all at once
            rest = [base[4] - base[3] + count, (base[4] - base[3] + count * 2 // 3).clamp_min(1) * (count > 0), base[6]]
        yield [*base[:at], *spans, *rest]


CASES: list[tuple[Site, Sizes]] = [
    (encoder_attention("bf16", 4, 64, 129, 1.0), sizes(70, 5, 2)),
    (encoder_attention("f16", 3, 80), sizes(50, 4, 2)),
    (encoder_attention("f32", 2, 64, 20, 1.0), sizes(48, 3, 2)),
    (encoder_attention("f32", 2, 20), sizes(5, 1, 2)),
    (encoder_attention("bf16", 2, 256), sizes(33, 2, 2)),
    (encoder_attention("bf16", 4, 128, 129), sizes(8, 8, 2)),
    (cross_attention("bf16", 4, 4, 64), sizes(7, 6, 3)),
    (cross_attention("bf16", 4, 2, 128, 16), sizes(60, 5, 9)),
    (cross_attention("f16", 3, 3, 80, 32), sizes(1, 1, 4)),
    (cross_attention("f32", 2, 2, 64, 16), sizes(40, 4, 8)),
    (cross_attention("f32", 2, 1, 20, 16), sizes(3, 3, 8)),
    (cross_attention("bf16", 2, 2, 256, 64), sizes(20, 2, 2)),
    (cross_attention("bf16", 4, 4, 64, pool=FP8), sizes(20, 4, 3)),
    (prefix_attention("bf16", 4, 4, 64), sizes(7, 6, 3)),
    (prefix_attention("bf16", 4, 2, 128, 16), sizes(60, 5, 9)),
    (prefix_attention("f16", 3, 3, 80, 32), sizes(1, 1, 4)),
    (prefix_attention("f32", 2, 2, 64, 16), sizes(40, 4, 8)),
    (prefix_attention("bf16", 4, 4, 64, pool=FP8), sizes(20, 4, 3)),
    (prefix_rope("bf16", 5, 64), sizes(60, 5, 30)),
    (prefix_rope("f32", 3, 20), sizes(9, 4, 9)),
    (prefix_rope("f16", 4, 128), sizes(3, 3, 80)),
]
