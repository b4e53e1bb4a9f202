"""Cases of adjusted logits and of log-probabilities: rows of every kind, in vocabularies that end within a slice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from penstock.engine.program import Site
from penstock.ir.graph import tensor
from penstock.ir.op import get
from penstock.ir.ops.control import MOST_LOGPROBS, Controls
from penstock.ir.ops.state import SlotLayout
from tests.kernels import subprocess_cases

Case = tuple[Site, Mapping[str, int]]
SHORT = 2  # tokens known in the first row, all of which a bad word starts with
BY_ROW = tensor("i32", "L")


def adjust(vocabulary: int, layout: SlotLayout, format: str = "f32") -> Site:
    return site("adjust", tensor(format, "L", vocabulary), tensor("i32", layout.size), BY_ROW, BY_ROW, layout)


def logprobs(vocabulary: int, layout: SlotLayout, format: str = "f32") -> Site:
    logits = tensor(format, "L", vocabulary), tensor("f32", "L", vocabulary)
    return site("logprobs", *logits, BY_ROW, tensor("i32", layout.size), BY_ROW, BY_ROW, layout)


def site(op: str, *given: Any) -> Site:
    types, attrs = given[:-1], given[-1].attrs()
    return Site(op, types, get(op).types(types, attrs), tuple(sorted(attrs.items())))


def small() -> Iterator[Case]:
    for vocabulary, layout, rows, format in (
        (5003, SlotLayout(7, 1500, 3), 9, "f32"),
        (33, SlotLayout(5, 40, 17, 6), 4, "bf16"),
        (9, SlotLayout(3, 4, 2, controls=200), 5, "f32"),
        (8192, SlotLayout(2, 30, 2), 1, "f16"),
    ):
        for op in (adjust, logprobs):
            yield op(vocabulary, layout, format), {"L": rows}


def large() -> Iterator[Case]:
    """Sizes of real models, too large to interpret: for the GPU alone."""
    for vocabulary, layout, rows in (
        (128256, SlotLayout(512, 4096, 256), 1),
        (128256, SlotLayout(64, 8192, 256), 300),
        ((1 << 19) - 3, SlotLayout(6, 1 << 17, 1), 11),
    ):
        for op in (adjust, logprobs):
            yield op(vocabulary, layout), {"L": rows}


CASES: list[Case] = [*small()]
GPU_CASES: list[Case] = [*CASES, *large()]


def examples(site: Site, sizes: Mapping[str, int], generator: torch.Generator) -> list[list[Any]]:
    """The op's own example, and what it leaves out: any rows at any positions, lists that are full, odd logits."""
    example = get(site.op).example
    assert example is not None
    device, attrs = str(generator.device), dict(site.attrs)

    def own() -> list[Any]:
        return list(example(site.inputs, attrs, sizes, generator, device))

    return [own(), *(varied(own(), SlotLayout(**attrs), generator, odd) for odd in (False, True))]


def varied(inputs: list[Any], layout: SlotLayout, generator: torch.Generator, odd: bool) -> list[Any]:
    """Random requests in the slots, rows at random places of their histories; logits with ties, or also odd ones."""
    *logits, slots, _, _ = inputs
    rows, vocabulary = logits[0].shape
    host = torch.Generator().manual_seed(int(torch.randint(1 << 30, (1,), generator=generator, device=slots.device)))

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=host, dtype=torch.int32)

    coarse = [(x.float() / 2).round().to(x.dtype) for x in logits[:2] if x.dim() == 2]  # zeros of either sign
    for x in coarse:
        if odd:
            x[:, ::5], x[0, 1::2] = torch.nan, -torch.inf
            x[rows // 2, vocabulary // 2] = torch.inf
            x[rows - 1, :] = torch.nan if rows > 2 else x[rows - 1, :]
    history = slots[layout.history_at :].view(layout.num_slots, layout.history)
    history[:] = (draw(0, vocabulary, *history.shape) % draw(1, 7, *history.shape[:1], 1).pow(5)).to(slots.device)
    own = slots[layout.controls_at : layout.history_at].view(layout.num_slots, layout.controls)
    for slot, known in enumerate(history.tolist()):
        numbers = torch.tensor(request(known, vocabulary, layout.controls, host).numbers, dtype=torch.int32)
        own[slot] = -5  # behind the last list anything may lie
        own[slot, : len(numbers)] = numbers.to(slots.device)
    placed = draw(-1, layout.num_slots, rows), draw(0, layout.history, rows)
    placed[0][0], placed[1][0] = 0, SHORT
    return [*coarse, *logits[len(coarse) :], slots, *(x.to(slots.device) for x in placed)]


def request(known: Sequence[int], vocabulary: int, room: int, host: torch.Generator) -> Controls:
    """Anything that may be asked of one request, within `room` numbers; `known`: its history."""

    def one(low: int, high: int) -> int:
        return int(torch.randint(low, max(high, low + 1), (1,), generator=host))

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randperm(vocabulary, generator=host)[:count].tolist())

    most = (room - 16) // 8
    at = [one(0, len(known)) for _ in range(min(20, most // 3))]
    words = [(*known[max(0, i - one(0, 4)) : i], *tokens(1)) for i in at] + [(*known[:SHORT], *tokens(1))]
    bias = tuple((token, float(one(-20, 20)) / 4) for token in tokens(one(0, most)))
    length = one(0, len(known))
    return Controls(
        length, length + one(0, 9), one(1, 8) / 4, one(-2, 3) / 2, one(-2, 3) / 8, one(0, 5),
        tokens(one(0, most)), bias, tuple(words), one(0, MOST_LOGPROBS + 2), bool(one(0, 2)),
    )  # fmt: skip


def agree(site: Site, inputs: Sequence[Any], want: Sequence[Any], got: Sequence[Any]) -> str:
    """What is infinite must be so in both; the rest as ever."""
    for i, (w, g) in enumerate(zip(want, got, strict=True)):
        if w.is_floating_point():
            if not torch.equal(w.isinf() * w.sign(), g.isinf() * g.sign()):
                return f"output {i}: not infinite in the same places"
            w.masked_fill_(w.isinf(), 0), g.masked_fill_(g.isinf(), 0)
    return subprocess_cases.differences(site, inputs, want, got)
