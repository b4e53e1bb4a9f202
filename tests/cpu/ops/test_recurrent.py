"""The convolution and the scan that keep state by slot: by the definition, however a text is cut, whoever is beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock.errors import GraphError
from penstock.ir import emit, leaf, tensor
from penstock.ir.ops.recurrent import causal_conv, delta_scan, selective_scan, softplus

H, P, W, G, K = 4, 3, 5, 2, 4
C = H * P + 2 * G * W


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"w": (C, K), "bias": (C,), "decay": (H,), "dt_bias": (H,), "skip": (H,)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def whole(x: torch.Tensor, dt: torch.Tensor, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """One text in float64, by the sums of the papers."""
    w, bias, decay, dt_bias, skip = (each.double() for each in given.values())
    padded = torch.cat([torch.zeros(K - 1, C, dtype=torch.float64), x.double()])
    z = torch.stack([(padded[t : t + K].t() * w).sum(1) for t in range(len(x))]) + bias
    z = torch.nn.functional.silu(z)
    steps = torch.nn.functional.softplus(dt.double() + dt_bias)
    inputs, b, c = z[:, : H * P].unflatten(1, (H, P)), z[:, H * P : -G * W], z[:, -G * W :]
    b, c = (each.unflatten(1, (G, W)).repeat_interleave(H // G, 1) for each in (b, c))
    y = torch.zeros(len(x), H, P, dtype=torch.float64)
    for t in range(len(x)):
        for s in range(t + 1):  # every earlier input by what is left of it
            left = torch.exp(-torch.exp(decay) * steps[s + 1 : t + 1].sum(0))
            y[t] += (left * steps[s] * (b[s] * c[t]).sum(-1))[:, None] * inputs[s]
    return z.float(), (y + skip[:, None] * inputs).flatten(1).float()


def i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Both:
    """The two ops one behind the other, over states that begin as somebody else's."""

    def __init__(self, slots: int) -> None:
        self.past, self.state = torch.randn(slots, C, K - 1) * 9, torch.randn(slots, H, P, W) * 9
        self.given = weights()

    def __call__(
        self, x: torch.Tensor, dt: torch.Tensor, counts: list[int], contexts: list[int], slots: list[int]
    ) -> torch.Tensor:
        starts = torch.tensor([0, *counts]).cumsum(0)[:-1].to(torch.int32)
        where = (starts, i32(*counts), i32(*contexts), i32(*slots))
        w, bias, *heads = self.given.values()
        past, z = causal_conv(self.past, x, w, *where, bias, act="silu")
        state, y = selective_scan(self.state, z, dt, *heads, *where, groups=G)
        assert past is self.past and state is self.state
        return y


def text(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(length, C, generator=g), torch.randn(length, H, generator=g)


def test_a_text_is_what_the_sums_say() -> None:
    x, dt = text(11, 1)
    both = Both(2)
    got = both(x, dt, [11], [11], [1])
    torch.testing.assert_close(got, whole(x, dt, both.given)[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(both.past[1], x[-3:].t())


def test_cuts_neighbours_and_padding_change_no_bit() -> None:
    (x, dt), (other, other_dt) = text(9, 1), text(4, 2)
    alone = Both(1)(x, dt, [9], [9], [0])
    both, got = Both(3), []
    before = both.state[1].clone()
    at = 0
    for step, count in enumerate((2, 1, 5, 1)):
        own, own_dt = x[at : at + count], dt[at : at + count]
        pad, pad_dt = text(2, 3)
        y = both(
            torch.cat([other[step : step + 1], own, pad]), torch.cat([other_dt[step : step + 1], own_dt, pad_dt]),
            [1, count, 0], [step + 1, at + count, 0], [0, 2, -1],
        )  # fmt: skip
        assert not y[1 + count :].any()
        got.append(y[1 : 1 + count])
        at += count
    assert torch.equal(torch.cat(got), alone)
    assert torch.equal(both.state[1], before), "nobody's slot is touched"


def test_a_memory_is_corrected_token_by_token_however_a_text_is_cut() -> None:
    """The delta rule as a product of matrices, in float64: s_t = (I - beta k k^T) kept s_(t-1) + beta k v^T."""
    g = torch.Generator().manual_seed(5)
    keys, size, width, count = 2, 5, 3, 9
    x, steps = torch.randn(count, 2 * keys * size + H * width, generator=g), torch.randn(count, 2 * H, generator=g)
    decay, bias = torch.randn(H, generator=g), torch.randn(H, generator=g)
    q, k, v = x.double().split((keys * size, keys * size, H * width), 1)
    q, k = (torch.nn.functional.normalize(each.unflatten(1, (keys, size)), dim=-1) for each in (q, k))
    beta, step = steps[:, :H].double().sigmoid(), torch.nn.functional.softplus(steps[:, H:].double() + bias)
    want = torch.zeros(count, H, width, dtype=torch.float64)
    for h in range(H):
        s, own = torch.zeros(size, width, dtype=torch.float64), h // (H // keys)
        for t in range(count):
            key, value = k[t, own], v[t].unflatten(0, (H, width))[h]
            forget = torch.eye(size, dtype=torch.float64) - beta[t, h] * torch.outer(key, key)
            s = forget @ (s * torch.exp(-decay[h].exp() * step[t, h])) + beta[t, h] * torch.outer(key, value)
            want[t, h] = s.t() @ q[t, own] / size**0.5
    state = torch.randn(3, H, size, width) * 9  # of somebody before
    other, at, got = state[1].clone(), 0, []
    for part in (4, 1, 3, 1):
        rows = i32(0, 0), i32(part, 0), i32(at + part, 0), i32(2, -1)
        _, y = delta_scan(state, x[at : at + part], steps[at : at + part], decay, bias, *rows)
        got.append(y)
        at += part
    torch.testing.assert_close(torch.cat(got), want.flatten(1).float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(state[1], other)
    _, whole_text = delta_scan(state, x, steps, decay, bias, i32(0), i32(count), i32(count), i32(0))
    assert torch.equal(torch.cat(got), whole_text) and torch.equal(state[0], state[2])


def test_steps_are_limited() -> None:
    x, dt = text(6, 4)
    both = Both(1)
    _, _, *heads = both.given.values()
    where = (i32(0), i32(6), i32(6), i32(0))
    _, limited = selective_scan(both.state.clone(), x, dt, *heads, *where, groups=G, least=0.4, most=0.5)
    steps = softplus(dt + both.given["dt_bias"]).clamp(0.4, 0.5)
    inverse = torch.log(torch.expm1(steps)) - both.given["dt_bias"]
    _, exact = selective_scan(both.state.clone(), x, inverse, *heads, *where, groups=G)
    torch.testing.assert_close(limited, exact)
    assert float(softplus(torch.tensor(90.0))) == 90.0


@pytest.mark.parametrize(
    ("op", "changes", "said"),
    [
        ("causal_conv", {1: ("bf16", "T", C)}, "do not fit"),
        ("causal_conv", {2: ("f32", C, 3)}, "do not fit"),
        ("causal_conv", {7: ("f32", 3)}, "bias has shape"),
        ("selective_scan", {1: ("f32", "T", C - 1)}, "do not fit"),
        ("selective_scan", {0: ("bf16", "N", H, P, W)}, "state bf16"),
        ("selective_scan", {2: ("f32", "T", 3)}, "dt f32"),
        ("delta_scan", {1: ("f32", "T", C + 1)}, "do not fit"),
        ("delta_scan", {2: ("f32", "T", H)}, "steps f32"),
    ],
)
def test_what_does_not_fit_is_refused(op: str, changes: dict[int, Any], said: str) -> None:
    spans = [("i32", "S")] * 4
    types: dict[str, list[Any]] = {
        "causal_conv": [("f32", "N", C, K - 1), ("f32", "T", C), ("f32", C, K), *spans, ("f32", C)],
        "selective_scan": [("f32", "N", H, P, W), ("f32", "T", C), ("f32", "T", H), *[("f32", H)] * 3, *spans],
        "delta_scan": [
            ("f32", "N", H, W, P),
            ("f32", "T", 2 * G * W + H * P),
            ("f32", "T", 2 * H),
            *[("f32", H)] * 2,
            *spans,
        ],
    }
    attrs: dict[str, Any] = {"causal_conv": {"act": "silu"}, "selective_scan": {"groups": G}, "delta_scan": {}}[op]

    def build(changes: dict[int, Any]) -> None:
        given = dict(enumerate(types[op])) | changes
        emit(op, *(leaf("input", str(i), tensor(*type)) for i, type in given.items()), **attrs)

    build({})
    with pytest.raises(GraphError, match=said):
        build(changes)
