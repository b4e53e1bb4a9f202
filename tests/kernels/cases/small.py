"""Cases of the memory-bound operations, of sampling, and of the step's own kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch

from penstock.engine.program import Site
from penstock.ir.graph import Type, tensor
from penstock.ir.op import get
from penstock.ir.ops.pointwise import ACTIVATIONS
from penstock.ir.ops.sample import uniform
from penstock.ir.ops.state import FIELDS, SlotLayout, commit_example, prepare_example
from tests.kernels import subprocess_cases

Case = tuple[Site, Mapping[str, int]]


def site(op: str, *types: Type, **attrs: Any) -> Site:
    return Site(op, types, get(op).types(types, attrs), tuple(sorted(attrs.items())))


def sizes(T: int, S: int = 1, L: int = 1) -> dict[str, int]:
    return {"T": T, "S": S, "L": L, "M": 8, "N": 64, "U": 4 + 3 * S + 2 * WRITES}


WRITES = 4500  # more than one round of the programs that share them


def norms() -> Iterator[Case]:
    for form, width, tokens in (
        ("bf16", 4096, 3),
        ("f16", 100, 70),
        ("f32", 1536, 1),
        ("bf16", 257, 5),
        ("f32", 16384, 2),
    ):
        x, w = tensor(form, "T", width), tensor(form, width)
        yield site("rms_norm", x, w, eps=1e-5), sizes(tokens)
        yield site("add_rms_norm", x, x, w, eps=1e-6, offset=1.0), sizes(tokens)
    yield site("rms_norm", tensor("bf16", "L", 64), tensor("bf16", 64), eps=1e-6, offset=1.0), sizes(9, L=5)
    for form, heads, head, tokens in (("bf16", 8, 128, 3), ("f16", 3, 80, 67), ("f32", 1, 64, 1)):
        x = tensor(form, "T", heads * head)
        yield site("head_rms_norm", x, tensor(form, head), heads=heads, eps=1e-6), sizes(tokens)


def streams() -> Iterator[Case]:
    for form, width, tokens in (("bf16", 4096, 3), ("f16", 33, 7), ("f32", 1000, 1)):
        x = tensor(form, "T", width)
        yield site("add", x, x), sizes(tokens)
        yield site("scale", x, factor=0.3), sizes(tokens)
        yield site("narrow", x, size=width - 5), sizes(tokens)
        yield site("split", x, sizes=(width // 2, width - width // 2)), sizes(tokens)
        yield site("split", x, sizes=(width - 24, 17, 7)), sizes(tokens)
        yield site("embedding", tensor("i32", "T"), tensor(form, 71, width)), sizes(tokens)
        yield site("take_rows", x, tensor("i32", "L")), sizes(tokens, L=4)
    yield site("add", tensor("bf16", "T", 160), tensor("bf16", "T", 160)), sizes(1700)
    yield site("take_rows", tensor("i32", "T", 5), tensor("i32", "L")), sizes(6, L=3)


WIDE = 9001  # a vocabulary beyond what a row's program holds in registers
SAMPLED = ("f32", "i32", "f32", "f32", "i32", "i32")  # temperature, top_k, top_p, min_p, seed, position


def samples() -> Iterator[Case]:
    for form, vocabulary, rows in (("f16", 33, 5), ("f32", 1000, 7), ("bf16", 5003, 3), ("f32", WIDE, 3)):
        vectors = (tensor(f, "L") for f in SAMPLED)
        yield site("sample", tensor(form, "L", vocabulary), *vectors), sizes(rows, L=rows)


def steps() -> Iterator[Case]:
    layouts = (
        SlotLayout(5, 40, 3),
        SlotLayout(21, 130, 17, 6),
        SlotLayout(300, 24, 1030, 3),
        SlotLayout(9, 70, 40, 2, tables=4, slot_rows=1),
        SlotLayout(6, 60, 8, 3, tables=2, encoder=1),
    )
    shapes = (sizes(7, 3, 2), sizes(150, 20, 11), sizes(40, 130, 33), sizes(30, 8, 5), sizes(20, 5, 4))
    for layout, shape in zip(layouts, shapes, strict=True):
        arena, upload = tensor("i32", layout.size), tensor("i32", "U")
        yield site("prepare", arena, upload, **layout.attrs()), shape
        yield site("commit", arena, upload, tensor("i32", "L"), **layout.attrs()), shape


def centred() -> Iterator[Case]:
    """Normalisation about the mean."""
    for form, width, tokens in (("bf16", 4096, 3), ("f16", 100, 70), ("f32", 1536, 1), ("bf16", 257, 4)):
        x, w = tensor(form, "T", width), tensor(form, width)
        yield site("layer_norm", x, w, w, eps=1e-5), sizes(tokens)
        yield site("add_layer_norm", x, x, w, *([w] if tokens % 2 else []), eps=1e-3), sizes(tokens)
    yield site("layer_norm", tensor("bf16", "L", 64), tensor("f32", 64), eps=1e-6), sizes(9, L=5)
    for form, heads, head, tokens in (("bf16", 8, 128, 3), ("f16", 3, 80, 67), ("f32", 5, 64, 2)):
        x = tensor(form, "T", heads * head)
        yield site("head_layer_norm", x, tensor(form, heads, head), eps=1e-5), sizes(tokens)


def pointwise() -> Iterator[Case]:
    """Element by element: each activation in one format."""
    for i, (form, width, tokens) in enumerate((("bf16", 4096, 3), ("f16", 33, 7), ("f32", 1000, 1))):
        x = tensor(form, "T", width)
        yield site("clip", x, limit=0.75), sizes(tokens)
        yield site("softcap", x, cap=2.0), sizes(tokens)
        yield site("widen", x), sizes(tokens)
        for act in ACTIVATIONS[i::3]:
            yield site("activate", x, act=act), sizes(tokens)
            yield site("glu", x, x, act=act), sizes(tokens)


CASES: list[Case] = [*norms(), *streams(), *samples(), *steps(), *centred(), *pointwise()]


def large() -> Iterator[Case]:
    """Sizes of real models, too large to interpret: for the GPU alone."""
    for vocabulary, rows in ((128256, 1), (128256, 64), (262144, 7)):
        vectors = (tensor(f, "L") for f in SAMPLED)
        yield site("sample", tensor("f32", "L", vocabulary), *vectors), sizes(rows, L=rows)
    x, w = tensor("bf16", "T", 8192), tensor("bf16", 8192)
    yield site("add_rms_norm", x, x, w, eps=1e-5), sizes(2049)
    yield site("add_layer_norm", x, x, w, w, eps=1e-5), sizes(2049)
    yield site("head_rms_norm", tensor("bf16", "T", 4096), tensor("bf16", 128), heads=32, eps=1e-6), sizes(2049)
    yield site("split", tensor("bf16", "T", 6144), sizes=(4096, 1024, 1024)), sizes(2049)
    yield site("embedding", tensor("i32", "T"), tensor("bf16", 128256, 4096)), sizes(2049)
    layout = SlotLayout(512, 4096, 2048, 64)
    arena, upload = tensor("i32", layout.size), tensor("i32", "U")
    for shape in (sizes(1, 1, 1), sizes(512, 512, 512), sizes(16384, 512, 512)):
        yield site("prepare", arena, upload, **layout.attrs()), shape
        yield site("commit", arena, upload, tensor("i32", "L"), **layout.attrs()), shape


GPU_CASES: list[Case] = [*CASES, *large()]


def examples(site: Site, sizes: Mapping[str, int], generator: torch.Generator) -> list[list[Any]]:
    """The op's own example, and what it leaves out."""
    example = get(site.op).example
    assert example is not None
    attrs, device = dict(site.attrs), str(generator.device)
    if site.op == "prepare":
        return [prepare_example(site.inputs, attrs, sizes, generator, device), *(ragged_step(site, sizes, generator))]
    if site.op == "commit":
        sampled = torch.randint(0, 1000, (sizes["L"],), generator=generator, device=device, dtype=torch.int32)
        steps = [[*x, sampled] for x in ragged_step(site, sizes, generator)]
        return [commit_example(site.inputs, attrs, sizes, generator, device), *steps]
    inputs = list(example(site.inputs, attrs, sizes, generator, device))
    if site.op == "sample":
        return sampling(inputs, generator)
    if site.op == "take_rows":  # the example's zeros would not tell one row from another
        inputs[0] = chosen(site.inputs[0], sizes, generator)
        rows = site.inputs[1].concrete(sizes)
        inputs[1] = torch.randint(0, sizes["T"], rows, generator=generator, device=device, dtype=torch.int32)
    return [inputs]


def chosen(type: Type, sizes: Mapping[str, int], generator: torch.Generator) -> torch.Tensor:
    """Random numbers of any format."""
    numbers = torch.randn(type.concrete(sizes), generator=generator, device=generator.device) * 100
    return numbers.to(getattr(torch, type.format.torch_dtype))


def ragged_step(site: Site, sizes: Mapping[str, int], generator: torch.Generator) -> Iterator[list[Any]]:
    """Steps that fill the bucket in part or wholly: rows without tokens, any slots, some sampling, many writes."""
    layout = SlotLayout(**dict(site.attrs))
    device = generator.device
    for rows in (sizes["S"], max(1, sizes["S"] // 2)):
        counts = torch.bincount(
            torch.randint(0, rows, (sizes["T"] - (rows < sizes["S"]),), generator=generator, device=device),
            minlength=rows,
        ).clamp_max(layout.history // 2)
        samples = torch.zeros(rows, dtype=torch.int64, device=device)
        order = torch.randperm(rows, generator=generator, device=device)
        samples[order[: min(rows, sizes["L"]) - (rows < sizes["S"])]] = 1
        slots = torch.randint(-(2**31), 2**31 - 1, (layout.size,), generator=generator, device=device).int()
        floats = [layout.field("temperature"), layout.field("top_p"), layout.freqs_at]
        for at, size in zip(floats, (layout.num_slots,) * 2 + (layout.num_slots * layout.freqs,), strict=True):
            slots[at : at + size] = torch.rand(size, generator=generator, device=device).view(torch.int32)
        lengths = torch.randint(0, layout.history // 2, (layout.num_slots,), generator=generator, device=device)
        slots[: layout.num_slots] = lengths.int()
        own = torch.randperm(layout.num_slots, generator=generator, device=device)[:rows]
        pairs = writes(layout, generator)
        header = torch.tensor([rows, int(counts.sum()), int(samples.sum()), len(pairs)], device=device)
        upload = torch.cat([header, torch.stack([own, counts, samples], 1).flatten(), pairs.flatten()]).int()
        rest = torch.full((sizes["U"] - len(upload),), 7, dtype=torch.int32, device=device)
        yield [slots, torch.cat([upload, rest])]


def writes(layout: SlotLayout, generator: torch.Generator) -> torch.Tensor:
    """Distinct places of the arena, and values that are plausible for any of them."""
    skipped = layout.field(FIELDS[-1])  # leaves the fields alone that are floats or lengths
    count = min(WRITES, layout.size - skipped)
    places = torch.randperm(layout.size - skipped, generator=generator, device=generator.device)[:count] + skipped
    places = places[(places < layout.freqs_at) | (places >= layout.table_at)]
    values = torch.randint(0, 1 << 20, places.shape, generator=generator, device=generator.device)
    return torch.stack([places, values], 1)


def sampling(inputs: Sequence[Any], generator: torch.Generator) -> list[list[Any]]:
    """Rows of every kind, peaked and flat, with ties and with tokens that are forbidden."""
    logits, temperature, top_k, top_p, min_p, seed, position = inputs
    rows, vocabulary = logits.shape
    row = torch.arange(rows, device=logits.device)
    mixed = [
        logits,
        torch.where(row % 4 == 0, 0.0, 0.3 + 0.25 * (row % 7)),
        torch.tensor([0, 7, 1, 50, vocabulary, -1], device=logits.device, dtype=torch.int32)[(row + 5) % 6],
        torch.tensor([1.0, 0.9, 0.3, 0.999, 1.0], device=logits.device)[row % 5],
        torch.tensor([0.05, 0.0, 0.0, 0.3, 0.0, 0.9, 0.01], device=logits.device)[row % 7],
        seed,
        position,
    ]
    coarse = (logits.float() * 2).round() / 2  # many equal logits
    coarse[:, 1::5] = -torch.inf
    flat = logits.float() * 1e-3
    tied = [coarse.to(logits.dtype), *mixed[1:]]
    free = [temperature * 2, top_k * 0, top_p * 0 + 1.0, min_p, -seed - 1, position]
    spread = [flat.to(logits.dtype), *mixed[1:]]
    if vocabulary == WIDE:  # in flat rows; what peaked ones keep fits, and is met with elsewhere
        return [spread, [logits, *free], *extremes(inputs), *floors(spread[0], inputs), *broken(inputs)]
    if vocabulary >= 1000:  # so few tokens, nearly equal, that one too many would show: drawn itself, or in the mass
        few = (
            [spread[0], temperature + 1, ((row + i) % 5 + 1).int(), p, min_p, seed * (i + 1), position]
            for i, p in enumerate((free[2], free[2] * 0.45, free[2] * 0.45, free[2] * 0.7, free[2] * 0.25))
        )
        return [mixed, tied, [logits, *free], *few, *floors(spread[0], inputs)]
    return [mixed, tied, [logits, *free], spread, *broken(inputs)]


def floors(flat: torch.Tensor, inputs: Sequence[Any]) -> list[list[Any]]:
    """min_p alone and behind other filters, over nearly equal logits, of which it keeps one, few or most."""
    _, temperature, top_k, top_p, _, seed, position = inputs
    row = torch.arange(len(seed), device=flat.device)
    spans = torch.tensor([1e-4, 5e-4, 1e-3, 3e-3], device=flat.device)  # of logits, below the largest
    return [
        [flat, temperature + 1, top_k * 0 + k, top_p * 0 + p, (-spans[(row + i) % 4] / 1.7).exp(), seed + i, position]
        for i, (k, p) in enumerate(((0, 1.0), (0, 1.0), (3, 1.0), (0, 0.01), (400, 1.0), (400, 0.5)))
    ]


def broken(inputs: Sequence[Any]) -> list[list[Any]]:
    """Rows with logits that are no numbers: some, all (each bit set but the sign's), all but one, and infinities."""
    logits, _, _, _, min_p, seed, position = inputs
    rows, vocabulary = logits.shape
    token, row = (torch.arange(n, device=logits.device) for n in (vocabulary, rows))
    bits = torch.int32 if logits.element_size() == 4 else torch.int16
    nothing = torch.full_like(logits, torch.iinfo(bits).max, dtype=bits).view(logits.dtype)
    kinds = [
        torch.where(token % 3 == 1, torch.nan, logits),
        nothing,
        torch.where(token == vocabulary // 2, logits, nothing),
        torch.where(token % 7 == 2, -torch.inf, torch.where(token % 2 == 0, nothing, logits)),
    ]
    some = torch.stack([kinds[i % 4][i] for i in range(rows)])
    counts = torch.tensor([1, 5, 300, 0], device=logits.device, dtype=torch.int32)
    hot = torch.full((rows,), 0.9, device=logits.device)
    return [
        [x, hot * t, counts[(row + i) % 4], torch.full_like(hot, p), min_p + 0.4 * (i % 2), seed, position]
        for x, t, i, p in (
            (nothing, 1, 0, 0.9), (nothing, 1, 3, 1.0), (nothing, 0, 0, 1.0), (some, 0, 0, 1.0), (some, 1, 0, 0.9),
            (some, 1, 1, 1.0), (some, 1, 2, 0.5), (some, 1, 3, 0.9),
        )
    ]  # fmt: skip


def extremes(inputs: Sequence[Any]) -> list[list[Any]]:
    """Rows that mislead a search: all equal, sorted, few tokens allowed, one far above all; cuts small and large."""
    logits, _, _, _, _, seed, position = inputs
    rows, vocabulary = logits.shape
    token = torch.arange(vocabulary, device=logits.device)
    hot = torch.full((rows,), 0.9, device=logits.device)
    ordered = logits.float().sort(-1, descending=True).values
    kinds = [
        (torch.ones_like(ordered), (200, 1, 0), (1.0, 0.5, 0.001), (1.0, 0.0, 0.5)),
        (ordered, (200, 64, 300), (0.7, 1.0, 0.95), (0.0, 0.2, 0.0)),
        (ordered / 4, (1000, 0, 100), (0.9, 1e-5, 1.0), (0.1, 0.0, 0.9)),
        (torch.where(token % 4001 == 7, ordered, -torch.inf), (2, 0, 50), (0.9, 0.9, 0.5), (0.0, 1e-30, 0.5)),
        (torch.where(token == vocabulary // 2, 6e4, ordered), (50, 0, 5000), (0.9, 0.9999, 1.0), (0.0, 0.1, 1e-40)),
    ]

    def vector(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([values[i % len(values)] for i in range(rows)], device=logits.device, dtype=dtype)

    return [
        [x.to(logits.dtype), hot, vector(k, torch.int32), *(vector(p, torch.float32) for p in ps), seed, position]
        for x, k, *ps in kinds
    ]


def agree(site: Site, inputs: Sequence[Any], want: Sequence[Any], got: Sequence[Any]) -> str:
    """Sampled tokens may differ only where rounding decides: scores or cuts within 1e-5 of each other."""
    if site.op != "sample" or not want[0].ne(got[0]).any():
        return subprocess_cases.differences(site, inputs, want, got)
    problems = []
    for row in want[0].ne(got[0]).nonzero()[:, 0].tolist():
        token = int(got[0][row])
        if not (0 <= token < inputs[0].shape[1]) or not plausible(*(x[row : row + 1] for x in inputs), token):
            problems.append(f"row {row}: {int(want[0][row])} != {token}")
    return "; ".join(problems)


def plausible(
    logits: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seed: Any, position: Any, token: int
) -> bool:
    """Whether a cut moved by rounding, or a score that is as good up to rounding, explains the token."""
    if float(temperature) <= 0:
        return False
    sample = get("sample").reference
    for p, least in product(*([x, x * (1 - 1e-5), x * (1 + 1e-5)] for x in (top_p, min_p))):
        best = int(sample(logits, temperature, top_k, p, least, seed, position))
        if best == token:
            return True
        scaled = logits.double() / temperature
        scores = scaled - (-uniform(seed, position, logits.shape[1]).double().log()).log()
        if scaled[0, token] >= scaled[0, best] and abs(float(scores[0, token] - scores[0, best])) < 1e-5:
            return True
    return False
