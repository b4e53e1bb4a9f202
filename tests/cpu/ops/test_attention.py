"""attention's reference against dense formulas, and a row's bits whatever stands beside it."""

from __future__ import annotations

import pytest
import torch

from penstock.errors import GraphError
from penstock.ir.graph import tensor
from penstock.ir.op import get
from penstock.ir.ops.attention import EXTRAS, attention

H, K, D, B, R = 6, 2, 16, 16, 12
KINDS = ((), ("slopes",), ("distances",), ("sinks",), ("slopes", "sinks"), EXTRAS)


def _extras(names: tuple[str, ...]) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(3)
    return [torch.randn(H, R, generator=make) if n == "distances" else torch.randn(H, generator=make) for n in names]


def _step(lengths: list[tuple[int, int]], pool: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of (queries, context); blocks in order, row after row."""
    count = torch.tensor([n for n, _ in lengths], dtype=torch.int32)
    context = torch.tensor([c for _, c in lengths], dtype=torch.int32)
    table = torch.arange(len(lengths) * 4, dtype=torch.int32).view(-1, 4)
    return pool, (count.cumsum(0) - count).int(), count, context, table


def _dense(q: torch.Tensor, kv: torch.Tensor, table: torch.Tensor, context: int, given: dict[str, torch.Tensor],
           window: int, softcap: float) -> torch.Tensor:  # fmt: skip
    """One sequence in float64, keys and values spread over all heads."""
    n = len(q)
    flat = kv[table.long()].double().permute(1, 2, 0, 3, 4).reshape(2, K, -1, D)[:, :, :context]
    keys, values = flat.repeat_interleave(H // K, 1)
    score = torch.einsum("thd,hkd->htk", q.double().view(n, H, D), keys) * 0.25
    score = softcap * torch.tanh(score / softcap) if softcap else score
    at, key = torch.arange(context - n, context)[:, None], torch.arange(context)[None]
    if "slopes" in given:
        score = score + given["slopes"].double()[:, None, None] * (key - at)
    if "distances" in given:
        score = score + given["distances"].double()[:, (at - key).clamp(0, R - 1)]
    seen = (key <= at) & ((key > at - window) if window else (key >= 0))
    score = score.masked_fill(~seen, -torch.inf)
    if "sinks" in given:
        score = torch.cat([score, given["sinks"].double()[:, None, None].expand(H, n, 1)], -1)
    return torch.einsum("htk,hkd->thd", score.softmax(-1)[..., :context], values).reshape(n, H * D).float()


@pytest.mark.parametrize("names", KINDS, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (11, 0.0), (0, 2.0)])
def test_biases_and_sinks(names: tuple[str, ...], window: int, softcap: float) -> None:
    lengths = [(20, 20), (1, 41), (5, 33)]
    make = torch.Generator().manual_seed(1)
    q, pool = torch.randn(26, H * D, generator=make), torch.randn(12, 2, K, B, D, generator=make)
    kv, start, count, context, table = _step(lengths, pool)
    extras = _extras(names)
    options = {"heads": H, "scale": 0.25, "window": window, "softcap": softcap, "extras": names}
    got = attention(q, kv, start, count, context, table, *extras, **options)
    for i, (n, c) in enumerate(lengths):
        own = q[start[i] : start[i] + n]
        want = _dense(own, kv, table[i], c, dict(zip(names, extras, strict=True)), window, softcap)
        torch.testing.assert_close(got[start[i] : start[i] + n], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", KINDS, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_chunks(names: tuple[str, ...]) -> None:
    make = torch.Generator().manual_seed(2)
    q, pool = torch.randn(40, H * D, generator=make), torch.randn(8, 2, K, B, D, generator=make)
    options = {"heads": H, "scale": 0.25, "extras": names}
    extras = _extras(names)
    whole = attention(q, *_step([(37, 37), (3, 50)], pool), *extras, **options)[:37]
    for at, n in ((0, 1), (9, 1), (36, 1), (5, 17), (20, 17)):
        part = attention(q[at : at + n], *_step([(n, at + n)], pool), *extras, **options)
        assert torch.equal(part, whole[at : at + n])


def test_extras_are_checked() -> None:
    types = (
        tensor("f32", "T", H * D), tensor("f32", "N", 2, K, B, D), *(tensor("i32", "S"),) * 3, tensor("i32", "S", "M"),
    )  # fmt: skip
    slopes, table, sinks = tensor("f32", H), tensor("f32", H, R), tensor("f32", H)
    for given, names, why in (
        ((slopes,), (), r"extras \(\) of 1 inputs"),
        ((slopes, table), ("distances", "slopes"), "in this order"),
        ((slopes,), ("slope",), "known, in this order, are"),
        ((tensor("f32", K),), ("sinks",), r"sinks f32\[2\], expected f32\[6\]"),
        ((tensor("bf16", H),), ("sinks",), r"sinks bf16\[6\], expected f32\[6\]"),
        ((slopes,), ("distances",), r"expected f32\[6,R\]"),
    ):
        with pytest.raises(GraphError, match=why):
            get("attention").types((*types, *given), {"heads": H, "scale": 1.0, "extras": names})
    assert get("attention").types((*types, slopes, table, sinks), {"heads": H, "scale": 1.0, "extras": EXTRAS})
