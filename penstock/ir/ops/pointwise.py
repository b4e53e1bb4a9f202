"""Element by element, and moving rows and columns."""

from __future__ import annotations

from typing import Any

from penstock.formats import parse
from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.examples import example

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "gelu_quick")


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


@op(lambda x: Type(x.shape, parse("f32")), example=example)
def widen(x: Any) -> Any:
    """x in float32."""
    return x.float()


def _positive(name: str) -> Any:
    def infer(x: Type, **limit: float) -> Type:
        if not limit[name] > 0:
            raise ValueError(f"{name} {limit[name]}, expected above 0")
        return x

    return infer


@op(_positive("limit"), example=example)
def clip(x: Any, *, limit: float) -> Any:
    """x, at most `limit` and at least -limit; what is not a number stays so."""
    return x.float().clamp(-limit, limit)


@op(_positive("cap"), example=example)
def softcap(x: Any, *, cap: float) -> Any:
    """cap * tanh(x / cap)."""
    return cap * torch.tanh(x.float() / cap)


def activation(x: Any, act: str) -> Any:
    """silu(x) = x * sigmoid(x); gelu by erf, by tanh or as x * sigmoid(1.702 x) (Hendrycks and Gimpel 2016); relu, and
    its square (So et al. 2021).

    Spelled out in exp, tanh and erf: torch's own silu and gelu give an element other bits when it falls into the tail
    behind the last full vector, and so depend on how many rows stand beside it.
    """
    if act == "silu":
        return x / (1 + torch.exp(-x))
    if act == "relu":
        return torch.relu(x)
    if act == "relu2":
        return torch.relu(x).square()
    if act == "gelu_quick":
        return x / (1 + torch.exp(-1.702 * x))
    if act == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))


def _activate(x: Type, *, act: str) -> Type:
    if act not in ACTIVATIONS:
        raise ValueError(f"activation {act!r} is not one of {', '.join(ACTIVATIONS)}")
    return x


@op(_activate, example=example)
def activate(x: Any, *, act: str) -> Any:
    """act(x): what stands between the products of a feed-forward without a gate."""
    return activation(x.float(), act)


def _glu(gate: Type, up: Type, *, act: str) -> Type:
    return _same(_activate(gate, act=act), up)


@op(_glu, example=example)
def glu(gate: Any, up: Any, *, act: str) -> Any:
    """act(gate) * up. Both [T,F]. (Shazeer 2020.)"""
    return activation(gate.float(), act) * up.float()


def _gate_rows(x: Type, gate: Type) -> Type:
    if gate.shape[:-1] != x.shape[:-1] or int(x.shape[-1]) % int(gate.shape[-1]):
        raise ValueError(f"gates {gate.shape} are not one or several for each row of {x.shape}")
    return x


@op(_gate_rows, example=example)
def gate_rows(x: Any, gate: Any) -> Any:
    """x * sigmoid(gate), each gate for an equal share of its row. x: [T,E], gate: [T,1], or [T,G] where G divides E."""
    share = 1 + torch.exp(-gate.float())
    return (x.float().unflatten(-1, (gate.shape[-1], -1)) / share[..., None]).flatten(-2)


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
