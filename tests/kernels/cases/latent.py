"""Latent attention, its append and its products by head, and gates of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.engine.program import Site
from penstock.ir.graph import Type, leaf, tensor
from penstock.ir.op import emit, get
from tests.kernels.cases.attention import CHUNKS, FP8, MIXTURES, on_attention

Sizes = dict[str, int]


def _site(op: str, *types: Type, **attrs: Any) -> Site:
    return Site.of(emit(op, *(leaf("input", str(i), t) for i, t in enumerate(types)), **attrs))


def attend(format: str, heads: int, turned: int, rank: int, block: int = 64, pool: str = "") -> Site:
    q, kv = tensor(format, "T", heads * (turned + rank)), tensor(pool or format, "N", 1, 1, block, turned + rank)
    rows = (tensor("i32", "S"),) * 3
    scale = (turned + rank) ** -0.5
    return _site("latent_attention", q, kv, *rows, tensor("i32", "S", "M"), heads=heads, scale=scale, rank=rank)


def append(format: str, turned: int, rank: int, block: int = 64, pool: str = "") -> Site:
    kv, by_token = tensor(pool or format, "N", 1, 1, block, turned + rank), tensor("i32", "T")
    key, latent = tensor(format, "T", turned), tensor(format, "T", rank)
    return _site("latent_append", kv, key, latent, by_token, by_token, tensor("i32", "S", "M"))


def heads(format: str, count: int, rows: int, columns: int, keep: int = 0) -> Site:
    x = tensor(format, "T", count * (keep + columns))
    return _site("head_linear", x, tensor(format, count, rows, columns), keep=keep or None)


def gate(format: str, width: int, gates: int = 1) -> Site:
    return _site("gate_rows", tensor(format, "T", width), tensor(format, "T", gates))


def sizes(tokens: int, sequences: int, blocks: int) -> Sizes:
    return {"T": tokens, "S": sequences, "L": sequences, "M": blocks, "N": sequences * blocks + 1}


CASES: list[tuple[Site, Sizes]] = [
    (attend("bf16", 16, 64, 128), sizes(13, 4, 2)),
    (attend("bf16", 16, 64, 512), sizes(1, 1, 8)),
    (attend("f16", 4, 8, 24, 16), sizes(25, 5, 9)),
    (attend("bf16", 40, 32, 64, 32), sizes(21, 3, 5)),  # a group that does not fill a tile
    (attend("bf16", 4, 16, 64), sizes(48, 6, 16)),
    (attend("f32", 4, 8, 24, 16), sizes(16, 8, 9)),
    (attend("f32", 3, 16, 32), sizes(40, 4, 16)),
    (attend("bf16", 16, 64, 128, pool=FP8), sizes(13, 4, 2)),
    (append("bf16", 64, 512), sizes(5, 3, 3)),
    (append("f32", 8, 24, 16), sizes(66, 2, 9)),
    (append("bf16", 16, 40, pool=FP8), sizes(5, 3, 3)),
    (heads("bf16", 4, 96, 64, keep=24), sizes(5, 2, 2)),
    (heads("f16", 3, 40, 33), sizes(70, 2, 2)),
    (heads("f32", 2, 24, 20, keep=8), sizes(3, 1, 2)),
    (heads("bf16", 2, 128, 200), sizes(130, 2, 2)),
    (gate("bf16", 300), sizes(5, 2, 2)),
    (gate("f32", 64), sizes(70, 2, 2)),
    (gate("bf16", 96, 96), sizes(5, 2, 2)),
    (gate("f16", 60, 12), sizes(3, 2, 2)),
    (gate("f16", 2048), sizes(1, 1, 2)),
]


def examples(site: Site, sizes: Mapping[str, int], generator: Any) -> list[list[Any]]:
    """The op's own example; of attention mixtures with stale caches and padding too, and of an append padding."""
    example = get(site.op).example
    assert example is not None

    def own() -> list[Any]:
        return list(example(site.inputs, dict(site.attrs), sizes, generator, str(generator.device)))

    if site.op == "latent_append":
        padded = own()
        padded[4][-1] = -1
        padded[2][..., ::7] *= 1000  # beyond what fp8 reaches
        return [own(), padded]
    if site.op != "latent_attention":
        return [own()]
    long = CHUNKS if sizes["T"] > 32 and sizes["M"] * int(site.inputs[1].shape[3]) >= 1024 else ()
    some = MIXTURES if generator.device.type == "cuda" else MIXTURES[sizes["T"] % len(MIXTURES) :][:1]
    return [own(), *(on_attention(site, own(), sizes, rows) for rows in (*some, *long))]
