"""Attention and position: ragged mixtures, odd heads, windows, padding, long contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.engine.program import Site
from penstock.ir.graph import Type, leaf, tensor
from penstock.ir.op import emit, get

Sizes = dict[str, int]
Rows = tuple[tuple[int, int], ...]  # queries of each sequence, and tokens before them
FP8 = "fp8_e4m3"
# Laid over a case's S and T as far as they fit: single tokens, a row of nothing, a few drafts to verify, prompts, a
# second chunk of one, rows that end where pages begin.
MIXTURES: tuple[Rows, ...] = (
    ((1, 0), (9, 0), (0, 77), (1, 63), (3, 40), (2, 0), (30, 21), (1, 100)),
    ((1, 128), (1, 1), (1, 127), (1, 64), (1, 33), (0, 0), (1, 90)),
    ((5, 59), (50, 3), (1, 2)),
    ((2, 63), (1, 127), (2, 95)),
)
# Chunks behind so many keys that their few tiles are cut into parts, where a case has room: at the borders of tiles and
# parts, beside single tokens, a short prompt and padding.
CHUNKS: tuple[Rows, ...] = (
    ((1, 300), (20, 555), (0, 0), (6, 762), (9, 0), (1, 511)),
    ((17, 495), (5, 768), (1, 640), (16, 1009)),
)


def _site(op: str, *types: Type, **attrs: Any) -> Site:
    return Site.of(emit(op, *(leaf("input", str(i), t) for i, t in enumerate(types)), **attrs))


def _extras(heads: int, extras: tuple[str, ...] = (), **_: Any) -> list[Type]:
    """Of distances fewer than most contexts are long."""
    return [tensor("f32", heads, 37) if name == "distances" else tensor("f32", heads) for name in extras]


def attention(format: str, heads: int, kv_heads: int, size: int, block: int = 64, pool: str = "", **attrs: Any) -> Site:
    """`pool`: the cache's format, where it is another."""
    rows = (tensor("i32", "S"),) * 3
    kv = tensor(pool or format, "N", 2, kv_heads, block, size)
    q = tensor(format, "T", heads * size)
    operands = (q, kv, *rows, tensor("i32", "S", "M"), *_extras(heads, **attrs))
    return _site("attention", *operands, heads=heads, scale=size**-0.5, **attrs)


def rope_append(
    format: str, heads: int, kv_heads: int, size: int, block: int = 64, half: int = 0, rows: int | str = 1,
    norms: bool = False, pool: str = "", **attrs: Any,
) -> Site:  # fmt: skip
    kv = tensor(pool or format, "N", 2, kv_heads, block, size)
    by_token = tensor("i32", "T")
    freqs = tensor("f32", rows, half or size // 2)
    types = [tensor(format, "T", (heads + 2 * kv_heads) * size), kv, by_token, freqs, by_token, tensor("i32", "S", "M")]
    if norms:
        types += [tensor(format, size)] * 2
        attrs = {"eps": 1e-6, **attrs}
    return _site("rope_append", *types, heads=heads, **attrs)


def rope_attention(
    format: str, heads: int, kv_heads: int, size: int, block: int = 64, half: int = 0, rows: int | str = 1,
    norms: bool = False, pool: str = "", **attrs: Any,
) -> Site:  # fmt: skip
    first = rope_append(format, heads, kv_heads, size, block, half, rows, norms, pool).inputs
    attrs = {"scale": size**-0.5, **({"eps": 1e-6} if norms else {}), **attrs}
    operands = (*first[:6], *(tensor("i32", "S"),) * 3, *first[6:], *_extras(heads, **attrs))
    return _site("rope_attention", *operands, heads=heads, **attrs)


def rope(format: str, heads: int, size: int, half: int, rows: int | str = 1, **attrs: Any) -> Site:
    by_token = tensor("i32", "T")
    return _site(
        "rope", tensor(format, "T", heads * size), by_token, tensor("f32", rows, half), by_token, heads=heads, **attrs
    )


def kv_append(format: str, kv_heads: int, size: int, block: int, pool: str = "") -> Site:
    by_token = tensor("i32", "T")
    x = tensor(format, "T", kv_heads * size)
    kv = tensor(pool or format, "N", 2, kv_heads, block, size)
    return _site("kv_append", kv, x, x, by_token, by_token, tensor("i32", "S", "M"))


def sizes(tokens: int, sequences: int, blocks: int) -> Sizes:
    return {"T": tokens, "S": sequences, "L": sequences, "M": blocks, "N": sequences * blocks + 1}


CASES: list[tuple[Site, Sizes]] = [
    (attention("bf16", 8, 2, 128), sizes(13, 4, 2)),
    (attention("bf16", 8, 1, 128), sizes(1, 1, 8)),  # more tasks than `combine` joins at once
    (attention("bf16", 4, 1, 64), sizes(8, 8, 3)),
    (attention("f16", 14, 2, 64, 16), sizes(25, 5, 9)),  # a group of 7, small blocks
    (attention("f16", 3, 3, 80, 32), sizes(21, 3, 5)),  # no groups, an odd head
    (attention("bf16", 4, 2, 256, 64, window=40, softcap=50.0), sizes(54, 5, 3)),
    (attention("bf16", 8, 1, 32, 128, window=16), sizes(17, 17, 2)),
    (attention("bf16", 71, 1, 64), sizes(12, 4, 2)),  # multi-query, nearly as many heads as a tile has rows
    (attention("f16", 2, 1, 16, 16, softcap=20.0), sizes(65, 2, 6)),
    (attention("bf16", 4, 2, 64, window=20), sizes(3, 2, 3)),  # two queries of a row see different keys
    (attention("f16", 4, 2, 64, 16, window=5), sizes(48, 8, 9)),  # a prompt's second chunk, a block below its window
    (attention("f32", 4, 2, 64, 64), sizes(16, 8, 3)),
    (attention("f32", 3, 1, 80, 16, window=30), sizes(15, 3, 9)),
    (rope_append("bf16", 8, 2, 128), sizes(13, 4, 3)),
    (rope_append("bf16", 4, 2, 64, 16, norms=True, offset=1.0), sizes(9, 3, 9)),
    (rope_append("f16", 6, 6, 80, 32, half=16, rows="S", scale=1.25), sizes(7, 7, 5)),
    (rope_append("f32", 5, 1, 96, norms=True), sizes(1, 1, 3)),
    (rope_append("f32", 2, 2, 16, 16, rows="S"), sizes(67, 3, 9)),
    (rope_attention("bf16", 8, 2, 128), sizes(13, 4, 2)),
    (rope_attention("bf16", 8, 2, 128), sizes(1, 1, 8)),  # two tasks for the one row
    (rope_attention("bf16", 8, 2, 128), sizes(3, 2, 3)),  # a row whose own keys lie on two pages
    (rope_attention("bf16", 8, 2, 128), sizes(8, 8, 3)),
    (rope_attention("f16", 14, 2, 64, 16), sizes(25, 5, 9)),  # a group of 7, small blocks
    (rope_attention("f16", 3, 3, 80, 32, half=16, rows="S", factor=1.25), sizes(21, 3, 5)),  # heads turn in part
    (rope_attention("bf16", 4, 2, 256, 64, window=40, softcap=50.0), sizes(54, 5, 3)),
    (rope_attention("bf16", 4, 4, 64, 16, norms=True, offset=1.0, window=50), sizes(9, 3, 9)),
    (rope_attention("bf16", 8, 1, 32, 128, window=16), sizes(17, 17, 2)),
    (rope_attention("bf16", 4, 2, 64, window=20), sizes(3, 2, 3)),
    (rope_attention("bf16", 71, 1, 64), sizes(12, 4, 2)),
    (rope_attention("f32", 5, 1, 96, norms=True), sizes(1, 1, 3)),
    (rope_attention("f32", 4, 2, 64, 16, rows="S"), sizes(16, 8, 9)),
    (rope_attention("f32", 4, 2, 64), sizes(3, 2, 3)),  # its own keys fall to two tasks
    (attention("f16", 7, 1, 64, 16), sizes(44, 5, 64)),
    (attention("bf16", 4, 2, 256, 64, window=600, softcap=50.0), sizes(48, 6, 16)),
    (attention("f32", 1, 1, 80, 32), sizes(40, 4, 32)),
    (attention("bf16", 4, 1, 128, pool=FP8), sizes(48, 6, 16)),
    (rope_attention("bf16", 4, 1, 128), sizes(48, 6, 16)),
    (rope("bf16", 8, 128, 64), sizes(5, 2, 2)),
    (rope("f32", 3, 80, 20, "S", scale=1.1), sizes(6, 3, 2)),
    (rope("f16", 71, 64, 32), sizes(9, 2, 2)),
    (kv_append("bf16", 8, 128, 64), sizes(5, 3, 3)),
    (kv_append("f32", 3, 80, 16), sizes(66, 2, 9)),
    (attention("bf16", 8, 2, 128, pool=FP8), sizes(13, 4, 2)),
    (attention("bf16", 8, 1, 128, pool=FP8), sizes(1, 1, 8)),
    (attention("f16", 14, 2, 64, 16, pool=FP8), sizes(25, 5, 9)),
    (attention("f16", 3, 3, 80, 32, pool=FP8), sizes(21, 3, 5)),
    (attention("bf16", 4, 2, 256, 64, window=40, softcap=50.0, pool=FP8), sizes(54, 5, 3)),
    (attention("bf16", 71, 1, 64, pool=FP8), sizes(12, 4, 2)),
    (attention("f32", 4, 2, 64, 64, pool=FP8), sizes(16, 8, 3)),
    (rope_append("bf16", 8, 2, 128, pool=FP8), sizes(13, 4, 3)),
    (rope_append("bf16", 4, 2, 64, 16, norms=True, offset=1.0, pool=FP8), sizes(9, 3, 9)),
    (rope_append("f16", 6, 6, 80, 32, half=16, rows="S", scale=1.25, pool=FP8), sizes(7, 7, 5)),
    (rope_append("f32", 5, 1, 96, norms=True, pool=FP8), sizes(1, 1, 3)),
    (rope_attention("bf16", 8, 2, 128, pool=FP8), sizes(13, 4, 2)),
    (rope_attention("bf16", 8, 2, 128, pool=FP8), sizes(1, 1, 8)),
    (rope_attention("bf16", 8, 2, 128, pool=FP8), sizes(3, 2, 3)),
    (rope_attention("bf16", 4, 4, 64, 16, norms=True, offset=1.0, window=50, pool=FP8), sizes(9, 3, 9)),
    (rope_attention("f16", 3, 3, 80, 32, half=16, rows="S", factor=1.25, pool=FP8), sizes(21, 3, 5)),
    (rope_attention("bf16", 71, 1, 64, pool=FP8), sizes(12, 4, 2)),
    (rope_attention("f32", 5, 1, 96, norms=True, pool=FP8), sizes(1, 1, 3)),
    (kv_append("bf16", 8, 128, 64, pool=FP8), sizes(5, 3, 3)),
    (kv_append("f32", 3, 80, 16, pool=FP8), sizes(66, 2, 9)),
]


def examples(site: Site, sizes: Mapping[str, int], generator: Any) -> list[list[Any]]:
    """The op's own example, and mixtures with padding behind the last token and the last sequence.

    What must not count is poisoned: the cache behind each context (finite: the reference multiplies it by zero), and
    the block tables behind their last block and below the window.
    """
    example = get(site.op).example
    assert example is not None
    device = str(generator.device)

    def own() -> list[Any]:
        tensors = list(example(site.inputs, dict(site.attrs), sizes, generator, device))
        if any(t.format.name == FP8 for t in site.inputs):
            _beyond_range(site, tensors)
        return tensors

    mixture = {"attention": on_attention, "rope_attention": _on_both}.get(site.op, _on_tokens)
    some = MIXTURES if device.startswith("cuda") else MIXTURES[sizes["T"] % len(MIXTURES) :][:1]  # a CPU interprets
    if "attention" in site.op and sizes["T"] > 32 and sizes["M"] * int(site.inputs[1].shape[3]) >= 1024:
        some = (*some, *CHUNKS)
    return [own(), *(mixture(site, own(), sizes, rows) for rows in some)]


def _beyond_range(site: Site, tensors: list[Any]) -> None:
    """Some values to append that fp8 does not reach: they must become its largest number."""
    if site.op == "kv_append":
        tensors[1][..., ::7] *= 1000
        tensors[2][..., ::5] *= 1000
    elif site.op.startswith("rope"):
        tensors[0][..., -1] *= 1000  # of the last value: keys so large would leave a softmax of one


def _stale(kv: Any) -> float:
    """What must not count, in the cache."""
    import torch

    return float(min(1e4, torch.finfo(kv.dtype).max))


def _fitted(rows: Sequence[tuple[int, int]], sizes: Mapping[str, int], block: int) -> list[tuple[int, int]]:
    """(queries, tokens before) of each sequence, cut to the bucket and the block tables."""
    left, room, fitted = sizes["T"], sizes["M"] * block, []
    for count, before in rows[: sizes["S"]]:
        count = min(count, left, room)
        left -= count
        fitted.append((count, min(before, room - count)))
    return fitted + [(0, 0)] * (sizes["S"] - len(fitted))


def on_attention(
    site: Site, tensors: list[Any], sizes: Mapping[str, int], rows: Sequence[tuple[int, int]]
) -> list[Any]:
    import torch

    q, kv, _, _, _, table, *extras = tensors
    block, window = kv.shape[3], int(site.attr("window", 0))
    start, counts, context = _spans(_fitted(rows, sizes, block), q.device)
    for row, length in enumerate(context.tolist()):
        used = -(-length // block) if counts[row] else 0
        if length % block and used:
            kv[table[row, used - 1], :, :, length % block :] = _stale(kv)
        seen = max(0, length - int(counts[row]) - window + 1) // block if window else 0
        table[row, used:] = table[row, :seen] = torch.iinfo(torch.int32).min
    return [q, kv, start, counts, context, table, *extras]


def spans_of(rows: Sequence[tuple[int, int]], sizes: Mapping[str, int], room: int, device: Any) -> tuple[Any, Any, Any]:
    """query_start, query_len, context_len of rows cut to the bucket, of at most `room` tokens each."""
    return _spans(_fitted(rows, {**sizes, "M": 1}, room), device)


def _spans(fitted: Sequence[tuple[int, int]], device: Any) -> tuple[Any, Any, Any]:
    """query_start, query_len, context_len."""
    import torch

    counts = torch.tensor([count for count, _ in fitted], dtype=torch.int32, device=device)
    context = counts + torch.tensor([before for _, before in fitted], dtype=torch.int32, device=device)
    return torch.where(counts > 0, counts.cumsum(0) - counts, 0).to(torch.int32), counts, context


def _on_both(site: Site, tensors: list[Any], sizes: Mapping[str, int], rows: Sequence[tuple[int, int]]) -> list[Any]:
    """As `on_attention`, and what the step itself appends is not in the cache yet."""
    first = _on_tokens(site, tensors, sizes, rows)
    fitted = _fitted(rows, sizes, first[1].shape[3])
    for row, (count, before) in enumerate(fitted):
        for position in range(before, before + count):
            block, at = divmod(position, first[1].shape[3])
            first[1][first[5][row, block], :, :, at] = _stale(first[1])
    _, kv, *spans, table = on_attention(site, [first[0], first[1], *first[6:9], first[5]], sizes, rows)
    return [first[0], kv, *first[2:5], table, *spans, *first[9:]]


def _on_tokens(site: Site, tensors: list[Any], sizes: Mapping[str, int], rows: Sequence[tuple[int, int]]) -> list[Any]:
    """The first tokens at far positions where nothing is appended, padding behind the last sequence."""
    import torch

    names = {"rope": (1, 3), "kv_append": (3, 4), "rope_append": (2, 4), "rope_attention": (2, 4)}[site.op]
    kv = {"rope": None, "kv_append": 0, "rope_append": 1, "rope_attention": 1}[site.op]
    at, of = (tensors[i] for i in names)
    block = 1 << 17 if kv is None else tensors[kv].shape[3]
    at.zero_()
    of.fill_(-1)
    token = 0
    for row, (count, before) in enumerate(_fitted(rows, sizes, block)):
        before = before if kv is not None else 130_000 - 999 * row
        at[token : token + count] = torch.arange(before, before + count, dtype=torch.int32, device=at.device)
        of[token : token + count] = row
        token += count
    return tensors
