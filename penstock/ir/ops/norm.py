"""Normalisations."""

from __future__ import annotations

from typing import Any

from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.examples import example


def _norm(x: Type, w: Type, *, eps: float, offset: float = 0.0) -> Type:
    if w.shape != (x.shape[-1],):
        raise ValueError(f"weight {w.shape} does not fit rows of {x.shape[-1]}")
    return x


@op(_norm, example=example)
def rms_norm(x: Any, w: Any, *, eps: float, offset: float = 0.0) -> Any:
    """x / sqrt(mean(x^2) + eps) * (w + offset), over rows. x: [T,E], w: [E]. (Zhang and Sennrich 2019, eq. 4.)"""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (w.float() + offset)


def _head_norm(x: Type, w: Type, *, heads: int, eps: float, offset: float = 0.0) -> Type:
    if not isinstance(x.shape[-1], int) or x.shape[-1] != heads * int(w.shape[0]):
        raise ValueError(f"{heads} heads of {w.shape[0]} do not make rows of {x.shape[-1]}")
    return x


@op(_head_norm, example=example)
def head_rms_norm(x: Any, w: Any, *, heads: int, eps: float, offset: float = 0.0) -> Any:
    """`rms_norm` over each head of D numbers. x: [T,H*D], w: [D]."""
    return rms_norm(x.unflatten(-1, (heads, -1)), w, eps=eps, offset=offset).flatten(-2)


def _layer_norm(x: Type, w: Type, bias: Type | None = None, *, eps: float) -> Type:
    if bias is not None and bias.shape != w.shape:
        raise ValueError(f"bias {bias.shape} does not fit weight {w.shape}")
    return _norm(x, w, eps=eps)


@op(_layer_norm, example=example)
def layer_norm(x: Any, w: Any, bias: Any = None, *, eps: float) -> Any:
    """(x - mean(x)) / sqrt(var(x) + eps) * w + bias, over rows. x: [T,E], w, bias: [E]. (Ba et al. 2016, eq. 4.)"""
    x = x.float()
    x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w.float()
    return y if bias is None else y + bias.float()


def _head_layer_norm(x: Type, w: Type, *, eps: float) -> Type:
    if len(w.shape) != 2 or x.shape[-1] != int(w.shape[0]) * int(w.shape[1]):
        raise ValueError(f"weights {w.shape}, expected [heads, head size], do not make rows of {x.shape[-1]}")
    return x


@op(_head_layer_norm, example=example)
def head_layer_norm(x: Any, w: Any, *, eps: float) -> Any:
    """`layer_norm` over each head of D numbers, each with weights of its own. x: [T,H*D], w: [H,D]."""
    return layer_norm(x.unflatten(-1, tuple(w.shape)), w, eps=eps).flatten(-2)
