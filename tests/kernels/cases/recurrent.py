"""The convolution and the scan that keep state by slot: ragged mixtures, padding, texts that begin and go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.engine.program import Site
from penstock.ir.graph import Type, leaf, tensor
from penstock.ir.op import emit, get
from tests.kernels.cases.attention import spans_of

Sizes = dict[str, int]
SPANS = (tensor("i32", "S"),) * 4
# (tokens in the step, tokens before): single ones, a row of nothing, prompts, second chunks, few and many.
MIXTURES = (((1, 0), (9, 0), (0, 77), (1, 63), (2, 40), (30, 21)), ((40, 0), (3, 1), (1, 2), (1, 1)))


def _site(op: str, *types: Type, **attrs: Any) -> Site:
    return Site.of(emit(op, *(leaf("input", str(i), t) for i, t in enumerate(types)), **attrs))


def conv(format: str, channels: int, width: int = 4, bias: bool = True, act: str = "silu") -> Site:
    extra = (tensor(format, channels),) if bias else ()
    state, x = tensor(format, "N", channels, width - 1), tensor(format, "T", channels)
    return _site("causal_conv", state, x, tensor(format, channels, width), *SPANS, *extra, act=act)


def scan(format: str, heads: int, size: int, width: int, groups: int, **attrs: Any) -> Site:
    x = tensor(format, "T", heads * size + 2 * groups * width)
    by_head = (tensor("f32", heads),) * 3
    state = tensor("f32", "N", heads, size, width)
    return _site("selective_scan", state, x, tensor(format, "T", heads), *by_head, *SPANS, groups=groups, **attrs)


def delta(format: str, heads: int, keys: int, size: int, width: int) -> Site:
    """`heads` of `width` numbers, whose keys of `size` numbers are of `keys` heads."""
    x, steps = tensor(format, "T", 2 * keys * size + heads * width), tensor(format, "T", 2 * heads)
    by_head = (tensor("f32", heads),) * 2
    return _site("delta_scan", tensor("f32", "N", heads, size, width), x, steps, *by_head, *SPANS)


def sizes(tokens: int, sequences: int) -> Sizes:
    return {"T": tokens, "S": sequences, "L": sequences, "M": 4, "N": sequences + 2}


CASES: list[tuple[Site, Sizes]] = [
    (conv("bf16", 72), sizes(6, 6)),
    (conv("bf16", 72), sizes(40, 2)),
    (conv("f16", 96, 3, bias=False), sizes(45, 6)),
    (conv("f32", 33, 2), sizes(50, 4)),
    (conv("f32", 40, 6, act="gelu_tanh"), sizes(1, 1)),
    (scan("bf16", 2, 32, 128, 1), sizes(3, 3)),
    (scan("bf16", 2, 16, 32, 2), sizes(45, 6)),
    (scan("f16", 3, 24, 5, 3, least=0.3, most=0.9), sizes(50, 4)),
    (scan("f32", 4, 8, 16, 2), sizes(7, 7)),
    (scan("f32", 2, 5, 100, 1, least=0.1), sizes(1, 1)),
    (delta("bf16", 2, 1, 128, 32), sizes(3, 3)),
    (delta("bf16", 4, 2, 32, 16), sizes(45, 6)),
    (delta("f16", 3, 3, 5, 24), sizes(50, 4)),
    (delta("f32", 4, 2, 16, 8), sizes(7, 7)),
]


def examples(site: Site, sizes: Mapping[str, int], generator: Any) -> list[list[Any]]:
    """The op's own example, and mixtures with padding behind the last token and the last sequence."""
    example = get(site.op).example
    assert example is not None
    device = str(generator.device)
    at = {"causal_conv": 3, "selective_scan": 6, "delta_scan": 5}[site.op]
    found = []
    for rows in ((), *MIXTURES):
        tensors = list(example(site.inputs, dict(site.attrs), sizes, generator, device))
        if rows:
            tensors[at : at + 3] = spans_of(rows, sizes, 1 << 20, device)
            count = min(len(rows), sizes["S"])
            tensors[at + 3][count:] = -1
            tensors[at + 3][:count] += 1  # not the first slot
        found.append(tensors)
    return found
