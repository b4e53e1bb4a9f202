"""Element by element, and moving rows and columns."""

from __future__ import annotations

from typing import Any

from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.examples import example

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def _same(x: Type, y: Type, **_: Any) -> Type:
    if x != y:
        raise ValueError("operands differ in type")
    return x


@op(_same, example=example)
def add(x: Any, y: Any) -> Any:
    """x + y, same shapes."""
    return x.float() + y.float()


@op(lambda x, *, factor: x, example=example)
def scale(x: Any, *, factor: float) -> Any:
    """x * factor."""
    return x.float() * factor


def activation(x: Any, act: str) -> Any:
    """silu(x) = x * sigmoid(x); gelu by erf or by tanh (Hendrycks and Gimpel 2016); relu.

    Spelled out in exp, tanh and erf: torch's own silu and gelu give an element other bits when it falls into the tail
    behind the last full vector, and so depend on how many rows stand beside it.
    """
    if act == "silu":
        return x / (1 + torch.exp(-x))
    if act == "relu":
        return torch.relu(x)
    if act == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))


def _glu(gate: Type, up: Type, *, act: str) -> Type:
    if act not in ACTIVATIONS:
        raise ValueError(f"activation {act!r} is not one of {', '.join(ACTIVATIONS)}")
    return _same(gate, up)


@op(_glu, example=example)
def glu(gate: Any, up: Any, *, act: str) -> Any:
    """act(gate) * up. Both [T,F]. (Shazeer 2020.)"""
    return activation(gate.float(), act) * up.float()


def _split(x: Type, *, sizes: tuple[int, ...]) -> tuple[Type, ...]:
    if sum(sizes) != x.shape[-1]:
        raise ValueError(f"sizes {sizes} do not sum to {x.shape[-1]}")
    return tuple(Type((*x.shape[:-1], s), x.format) for s in sizes)


@op(_split, example=example)
def split(x: Any, *, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """Columns in consecutive groups."""
    return tuple(x.split(list(sizes), -1))


def _narrow(x: Type, *, size: int) -> Type:
    if not isinstance(x.shape[-1], int) or size > x.shape[-1]:
        raise ValueError(f"cannot take {size} of {x.shape[-1]} columns")
    return Type((*x.shape[:-1], size), x.format)


@op(_narrow, example=example)
def narrow(x: Any, *, size: int) -> Any:
    """The first `size` columns: what is left of a product that was padded for the hardware's sake."""
    return x[..., :size]


@op(lambda x, rows: Type((*rows.shape, *x.shape[1:]), x.format), example=example)
def take_rows(x: Any, rows: Any) -> Any:
    """x[rows]. x: [T,E], rows: i32[L] -> [L,E]."""
    return x[rows.long()]
