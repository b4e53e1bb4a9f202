"""References of small ops against torch's own or plain formulas, and a row's bits whatever stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from penstock.errors import GraphError
from penstock.ir.graph import tensor
from penstock.ir.op import get
from penstock.ir.ops.pointwise import ACTIVATIONS

E = 48


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _interleaved(x: torch.Tensor, positions: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """By complex numbers: one for each pair, the rest of a head as it is."""
    heads, half = x.unflatten(-1, (2, -1)), freqs.shape[-1]
    turned = torch.view_as_complex(heads[..., : 2 * half].double().unflatten(-1, (-1, 2)))
    turned = turned * torch.polar(torch.ones(()).double(), positions[:, None, None].double() * freqs[0])
    return torch.cat([torch.view_as_real(turned).flatten(-2).float(), heads[..., 2 * half :]], -1).flatten(-2)


RUN: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[torch.Tensor], Any]]] = {
    "layer_norm": (
        lambda x: get("layer_norm").reference(x, _numbers(E), _numbers(E) + 1, eps=1e-3),
        lambda x: functional.layer_norm(x, (E,), _numbers(E), _numbers(E) + 1, 1e-3),
    ),
    "layer_norm without bias": (
        lambda x: get("layer_norm").reference(x, _numbers(E), eps=1e-5),
        lambda x: functional.layer_norm(x, (E,), _numbers(E), None, 1e-5),
    ),
    "head_layer_norm": (
        lambda x: get("head_layer_norm").reference(x, _numbers(3, 16), eps=1e-5),
        lambda x: (functional.layer_norm(x.view(-1, 3, 16), (16,), eps=1e-5) * _numbers(3, 16)).view(-1, E),
    ),
    "clip": (lambda x: get("clip").reference(x, limit=0.5), lambda x: x.minimum(x * 0 + 0.5).maximum(x * 0 - 0.5)),
    "softcap": (lambda x: get("softcap").reference(x, cap=2.0), lambda x: (x.double() / 2).tanh().float() * 2),
    "widen": (get("widen").reference, lambda x: x.double().float()),
    "rope interleaved": (
        lambda x: get("rope").reference(x, *_rotation(x), heads=2, interleaved=True),
        lambda x: _interleaved(x, *_rotation(x)[:2]),
    ),
    "relu2": (lambda x: get("activate").reference(x, act="relu2"), lambda x: functional.relu(x) ** 2),
    "gelu_quick": (lambda x: get("activate").reference(x, act="gelu_quick"), lambda x: x * torch.sigmoid(1.702 * x)),
    "gelu": (lambda x: get("activate").reference(x, act="gelu"), functional.gelu),
}  # fmt: skip


def _rotation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The position of each row is told by its own numbers, so that a row alone keeps it."""
    return (x[:, 0].abs() * 100).int(), torch.tensor([[1.0, 0.3, 0.1, 0.03, 0.01]]), torch.zeros(len(x)).int()


@pytest.mark.parametrize("name", RUN)
def test_references(name: str) -> None:
    run, formula = RUN[name]
    x = _numbers(37, E) * 2 + 0.5
    torch.testing.assert_close(run(x), formula(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", RUN)
def test_a_row_has_the_same_bits_alone(name: str) -> None:
    run, _ = RUN[name]
    for width in (E,):
        x = _numbers(37, width) * 2 + 0.5
        whole = run(x)
        for first, last in ((0, 1), (17, 18), (36, 37), (5, 12), (3, 36)):
            assert torch.equal(run(x[first:last]), whole[first:last])


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activate_is_what_glu_gates_with(act: str) -> None:
    x = _numbers(5, 7)
    assert torch.equal(get("activate").reference(x, act=act), get("glu").reference(x, torch.ones(5, 7), act=act))


def test_a_clip_keeps_what_is_not_a_number() -> None:
    got = get("clip").reference(torch.tensor([[float("nan"), float("inf"), -3.0]]), limit=2.0)
    assert got[0, 0].isnan() and got[0, 1:].tolist() == [2.0, -2.0]


def test_operands_are_checked() -> None:
    x = tensor("f32", "T", E)
    for op, types, attrs, why in (
        ("layer_norm", (x, tensor("f32", 3)), {"eps": 1e-5}, "does not fit rows of 48"),
        ("layer_norm", (x, tensor("f32", E), tensor("f32", 3)), {"eps": 1e-5}, "does not fit weight"),
        ("head_layer_norm", (x, tensor("f32", 3, 15)), {"eps": 1e-5}, "do not make rows of 48"),
        ("head_layer_norm", (x, tensor("f32", E)), {"eps": 1e-5}, "expected .heads, head size."),
        ("activate", (x,), {"act": "mish"}, "'mish' is not one of silu"),
        ("clip", (x,), {"limit": 0.0}, "limit 0.0, expected above 0"),
        ("softcap", (x,), {"cap": -1.0}, "cap -1.0, expected above 0"),
    ):
        with pytest.raises(GraphError, match=why):
            get(op).types(types, attrs)
