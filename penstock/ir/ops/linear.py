"""Matrix products."""

from __future__ import annotations

from typing import Any

from penstock import formats
from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.examples import example

ROW_TILE = 8  # rows of one product on a CPU: fixed, so that a row's bits do not depend on how many rows stand beside it


def linear_type(x: Type, w: Type, bias: Type | None = None, *, out: str = "") -> Type:
    """x: [T,K], w: [N,K], bias: [N] -> [T,N] in the format `out`, or x's where `out` is empty."""
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"inner sizes {x.shape[-1]} and {w.shape[1]} differ")
    if bias is not None and bias.shape != (w.shape[0],):
        raise ValueError(f"bias has shape {bias.shape}, expected ({w.shape[0]},)")
    return Type((*x.shape[:-1], w.shape[0]), formats.parse(out) if out else x.format)


@op(linear_type, example=example)
def linear(x: Any, w: Any, bias: Any = None, *, out: str = "") -> Any:
    """x @ w.T + bias. x: [T,K], w: [N,K], bias: [N]; returns float32 [T,N]."""
    y = _tiled(x.float(), w.float().t())
    return y if bias is None else y + bias.float()


def _tiled(x: Any, wt: Any) -> Any:
    """On a CPU always products of ROW_TILE rows: BLAS picks its summation order by shape."""
    if x.device.type != "cpu":
        return x @ wt
    rows = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -rows % ROW_TILE)) if rows % ROW_TILE else x
    if len(padded) == ROW_TILE:
        return (padded @ wt)[:rows]
    return torch.cat([tile @ wt for tile in padded.split(ROW_TILE)])[:rows] if rows else x @ wt
