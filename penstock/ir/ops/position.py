"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.examples import fill, ragged


def _rope(
    x: Type, positions: Type, freqs: Type, rows: Type, *, heads: int, scale: float = 1.0, interleaved: bool = False
) -> Type:  # fmt: skip
    width = x.shape[-1]
    if not isinstance(width, int) or width % heads or 2 * int(freqs.shape[-1]) > width // heads:
        raise ValueError(f"{heads} heads in rows of {width} cannot be rotated by {freqs.shape[-1]} frequencies")
    return x


def example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    """Positions of a plausible ragged step, frequencies of the common geometric kind."""
    rows, positions, *_ = ragged(sizes, 1024, device)
    return [fill(types[0], sizes, generator, device), positions, example_freqs(types[2], sizes, device), rows]


def example_freqs(type: Type, sizes: Mapping[str, int], device: str) -> Any:
    count, width = type.concrete(sizes)
    return (10000.0 ** -(torch.arange(width, device=device) / width)).expand(count, width).contiguous()


@op(_rope, example=example)
def rope(
    x: Any, positions: Any, freqs: Any, rows: Any, *, heads: int, scale: float = 1.0, interleaved: bool = False
) -> Any:  # fmt: skip
    """Rotate pairs (i, i + d/2) of the first d = 2 * freqs.shape[1] numbers of each head; `interleaved`: pairs
    (2i, 2i + 1). (Su et al. 2021.)

    x: [T,H*D]; positions: i32[T]; freqs, radians a position: f32[1,d/2] for all or f32[S,d/2] by sequence, `rows`:
    i32[T] naming each token's sequence (-1: padding). `scale` multiplies cosine and sine (YaRN, longrope).
    """
    chosen = freqs if freqs.shape[0] == 1 else freqs[rows.long().clamp_min(0)]
    angle = (positions.float()[:, None] * chosen.float())[:, None, :]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    x = x.float().unflatten(-1, (heads, -1))
    half = freqs.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = turning.unflatten(-1, (half, 2)) if interleaved else turning.unflatten(-1, (2, half)).transpose(-1, -2)
    a, b = pairs.unbind(-1)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1 if interleaved else -2)
    return torch.cat([turned.flatten(-2), rest], -1).flatten(-2)
