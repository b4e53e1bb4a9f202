"""References of encoder-decoders against dense formulas, and a row's bits whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from penstock.errors import GraphError
from penstock.ir.cost import cost
from penstock.ir.graph import tensor
from penstock.ir.op import get
from penstock.ir.ops.encoder import cross_attention, encoder_attention
from penstock.ir.ops.weight import distances

H, K, D, B, R = 6, 2, 16, 16, 5


def spans(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    count = torch.tensor(counts, dtype=torch.int32)
    return (count.cumsum(0) - count).int(), count


@pytest.mark.parametrize("biased", [False, True])
def test_each_token_of_an_input_sees_all_of_it(biased: bool) -> None:
    make, counts = torch.Generator().manual_seed(1), [20, 0, 1, 7]
    q, k, v = (torch.randn(30, H * D, generator=make) for _ in range(3))
    bias = torch.randn(H, 2 * R - 1, generator=make)
    given = (bias,) if biased else ()
    got = encoder_attention(q, k, v, *spans(counts), *given, heads=H, scale=0.3)
    start = 0
    for n in counts:
        own = (x[start : start + n].double().view(n, H, D).transpose(0, 1) for x in (q, k, v))
        a, b, c = own
        score = a @ b.transpose(1, 2) * 0.3
        if biased:
            apart = torch.arange(n)[None] - torch.arange(n)[:, None]
            score = score + bias.double()[:, apart.clamp(1 - R, R - 1) + R - 1]
        want = (score.softmax(-1) @ c).transpose(0, 1).reshape(n, H * D).float()
        assert torch.allclose(got[start : start + n], want, atol=1e-5)
        alone = [x[start : start + n] for x in (q, k, v)]
        assert torch.equal(encoder_attention(*alone, *spans([n]), *given, heads=H, scale=0.3), got[start : start + n])
        start += n
    assert not got[28:].any()  # padding


def test_a_query_sees_all_of_its_input_whatever_its_own_position() -> None:
    make, counts, lengths = torch.Generator().manual_seed(2), [3, 0, 1, 9], [40, 16, 1, 33]
    q, pool = torch.randn(15, H * D, generator=make), torch.randn(12, 2, K, B, D, generator=make)
    table, seen = torch.arange(12, dtype=torch.int32).view(4, 3), torch.tensor(lengths, dtype=torch.int32)
    context = torch.tensor([3, 0, 20, 14], dtype=torch.int32)
    got = cross_attention(q, pool, *spans(counts), context, seen, table, heads=H, scale=0.25)
    start = 0
    for row, (n, length) in enumerate(zip(counts, lengths, strict=True)):
        flat = pool[table[row].long()].double().permute(1, 2, 0, 3, 4).reshape(2, K, -1, D)[:, :, :length]
        keys, values = flat.repeat_interleave(H // K, 1)
        score = torch.einsum("thd,hkd->htk", q[start : start + n].double().view(n, H, D), keys) * 0.25
        want = torch.einsum("htk,hkd->thd", score.softmax(-1), values).reshape(n, H * D).float()
        assert torch.allclose(got[start : start + n], want, atol=1e-5)
        start += n
    assert not got[13:].any()
    # One query after another, as a decoder asks, gives the same bits as all at once.
    for i in range(9):
        one = cross_attention(
            q[4 + i : 5 + i], pool, *spans([1]), torch.tensor([6 + i]), seen[3:], table[3:], heads=H, scale=0.25
        )
        assert torch.equal(one[0], got[4 + i])


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20), (32, 40), (64, 1000)])
def test_distances_have_the_buckets_of_t5(buckets: int, most: int, behind: bool) -> None:
    table = torch.randn(buckets, H)
    got = distances(table, max_distance=most, behind=behind)
    apart = torch.arange(-most - 50, most + 51 if behind else 1)  # key less query
    which = T5Attention._relative_position_bucket(apart, behind, buckets, most)
    ours = (apart.clamp(-most, most) + most) if behind else (-apart).clamp(0, most)
    assert torch.equal(got[:, ours], table[which].T)


def test_what_does_not_fit_is_refused() -> None:
    x, rows = tensor("f32", "T", 96), tensor("i32", "S")
    for bias, heads in ((tensor("f32", 6, 8), 6), (tensor("f32", 5, 9), 6), (tensor("f32", 7, 9), 7)):
        with pytest.raises(GraphError, match=r"encoder_attention.*(expected f32|do not fit)"):
            get("encoder_attention").types([x, x, x, rows, rows, bias], {"heads": heads, "scale": 1.0})
    pool = tensor("f32", "N", 2, 2, 16, 16)
    with pytest.raises(GraphError, match="5 heads do not fit"):
        get("cross_attention").types([x, pool, *[rows] * 4, tensor("i32", "S", "M")], {"heads": 5, "scale": 1.0})
    with pytest.raises(GraphError, match="32 buckets do not end at distance 8"):
        get("distances").types([tensor("f32", 32, 4)], {"max_distance": 8, "behind": True})


def test_what_it_costs() -> None:
    """Ten tokens in two inputs, 25 pairs each; and ten queries of two rows over a hundred keys each."""
    x, rows, sizes = tensor("bf16", "T", 96), tensor("i32", "S"), {"T": 10, "S": 2, "M": 9}
    whole = cost("encoder_attention", [x, x, x, rows, rows], [x], (("heads", 6), ("scale", 1.0)), sizes)
    assert (whole.flops, whole.bytes) == (4 * 50 * 96, 4 * 10 * 96 * 2 + 2 * 2 * 4)
    operands = [x, tensor("bf16", "N", 2, 2, 16, 16), *[rows] * 4, tensor("i32", "S", "M")]
    over = cost("cross_attention", operands, [x], (("heads", 6), ("scale", 1.0)), sizes, context=100)
    assert over.flops == 4 * 10 * 100 * 96
    assert over.bytes == 2 * 2 * 100 * 2 * 16 * 2 + 2 * 10 * 96 * 2 + 4 * 2 * 4 + 2 * 9 * 4
