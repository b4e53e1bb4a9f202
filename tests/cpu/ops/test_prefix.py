"""Ops over a prefix against dense formulas, and what of a row's bits depends on nothing else."""

from __future__ import annotations

import pytest
import torch

from penstock.errors import GraphError
from penstock.ir.graph import tensor
from penstock.ir.op import get
from penstock.ir.ops.prefix import prefix_attention, prefix_rope

H, K, D, B = 6, 2, 16, 16
COUNTS, CONTEXT, PREFIX = [20, 0, 1, 9], [20, 0, 30, 41], [17, 0, 12, 5]  # a prompt, nothing, a text, a prompt's rest


def spans(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    count = torch.tensor(counts, dtype=torch.int32)
    return (count.cumsum(0) - count).int(), count


def test_a_query_sees_its_prefix_and_what_came_before_it() -> None:
    make = torch.Generator().manual_seed(1)
    q, pool = torch.randn(32, H * D, generator=make), torch.randn(13, 2, K, B, D, generator=make)
    table, context = torch.arange(1, 13, dtype=torch.int32).view(4, 3), torch.tensor(CONTEXT)
    got = prefix_attention(q, pool, *spans(COUNTS), context, torch.tensor(PREFIX), table, heads=H, scale=0.25)
    start = 0
    for row, (n, length, prefix) in enumerate(zip(COUNTS, CONTEXT, PREFIX, strict=True)):
        flat = pool[table[row].long()].double().permute(1, 2, 0, 3, 4).reshape(2, K, -1, D)[:, :, :length]
        keys, values = flat.repeat_interleave(H // K, 1)
        score = torch.einsum("thd,hkd->htk", q[start : start + n].double().view(n, H, D), keys) * 0.25
        at, key = torch.arange(length - n, length)[:, None], torch.arange(length)
        score = score.masked_fill((key > at) & (key >= prefix), -torch.inf)
        want = torch.einsum("htk,hkd->thd", score.softmax(-1), values).reshape(n, H * D).float()
        assert torch.allclose(got[start : start + n], want, atol=1e-5)
        start += n
    assert not got[30:].any()  # padding


def test_what_follows_a_prefix_changes_no_bit_of_it() -> None:
    """As when a text is computed anew with what it had generated, over blocks of other numbers behind the prefix."""
    make = torch.Generator().manual_seed(2)
    q, pool = torch.randn(40, H * D, generator=make), torch.randn(4, 2, K, B, D, generator=make)
    table, prefix = torch.tensor([[1, 2, 3]]), torch.tensor([17])

    def first(n: int) -> torch.Tensor:
        spanned = *spans([n]), torch.tensor([n]), prefix, table
        return prefix_attention(q[:n], pool, *spanned, heads=H, scale=0.25)[:17]

    alone = first(17)
    assert torch.equal(first(40), alone)
    pool[3] = 1e4
    pool[2, :, :, 1:] = -1e4
    assert torch.equal(first(40), alone)


def test_halves_turn_by_their_own_places() -> None:
    make = torch.Generator().manual_seed(3)
    x, freqs = torch.randn(9, 3 * 8, generator=make), torch.tensor([[1.0, 0.01]])
    positions, rows = torch.tensor([0, 1, 2, 3, 4, 7, 30, 0, 0]), torch.tensor([0, 0, 0, 0, 0, 1, 1, -1, -1])
    got = prefix_rope(x, positions, freqs, rows, torch.tensor([3, 8]), heads=3).view(9, 3, 8)
    within, behind = [0, 1, 2, 2, 2, 7, 7, 0, 0], [0, 0, 0, 1, 2, 0, 23, 0, 0]
    for part, places in ((slice(0, 4), within), (slice(4, 8), behind)):
        a, b = x.view(9, 3, 8)[..., part].double().chunk(2, -1)
        angle = torch.tensor(places).double()[:, None, None] * freqs[0].double()
        z = torch.complex(a, b) * torch.exp(1j * angle)
        want = torch.cat([z.real, z.imag], -1).float()
        assert torch.allclose(got[..., part], want, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    by_token, by_row = tensor("i32", "T"), tensor("i32", "S")
    for width, freqs in ((24, (1, 3)), (24, ("S", 2)), (25, (1, 2))):
        operands = [tensor("f32", "T", width), by_token, tensor("f32", *freqs), by_token, by_row]
        with pytest.raises(GraphError, match=r"3 heads in rows of .* are not two halves each"):
            get("prefix_rope").types(operands, {"heads": 3})
    pool, x = tensor("f32", "N", 2, 2, 16, 16), tensor("f32", "T", 96)
    with pytest.raises(GraphError, match="5 heads do not fit"):
        get("prefix_attention").types([x, pool, *[by_row] * 4, tensor("i32", "S", "M")], {"heads": 5, "scale": 1.0})
