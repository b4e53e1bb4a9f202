"""Weight expressions: how an engine's weights come from a checkpoint's tensors. Build and refit run them, steps never.

A fused weight is a `concat`, a rank's share a `slice`, an aligned one a `pad`; random and tied weights are expressions
like any other, so the manifest states every weight's origin and refit can compute it again.
"""

from __future__ import annotations

import math
from typing import Any

from penstock import formats
from penstock.ir.graph import Type
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.sample import GOLDEN, MASK, mix


def _concat(*parts: Type, dim: int) -> Type:
    head = parts[0]
    for part in {*parts}:
        if part.format != head.format or _without(part.shape, dim) != _without(head.shape, dim):
            raise ValueError(f"cannot concatenate {part} and {head} along {dim}")
    shape = list(head.shape)
    shape[dim] = sum(int(p.shape[dim]) for p in parts)
    return Type(tuple(shape), head.format)


def _without(shape: tuple[Any, ...], dim: int) -> tuple[Any, ...]:
    return shape[:dim] + shape[dim + 1 :]


@op(_concat, weight=True)
def concat(*parts: Any, dim: int) -> Any:
    """The parts one after another along `dim`."""
    return torch.cat(parts, dim)


def _slice(x: Type, *, dim: int, start: int, stop: int) -> Type:
    if not 0 <= start < stop <= int(x.shape[dim]):
        raise ValueError(f"rows {start}:{stop} of {x.shape[dim]}")
    return Type((*x.shape[:dim], stop - start, *x.shape[dim + 1 :]), x.format)


@op(_slice, weight=True)
def slice_(x: Any, *, dim: int, start: int, stop: int) -> Any:
    """Rows start to stop along `dim`."""
    return x.narrow(dim, start, stop - start)


def _pad(x: Type, *, dim: int, size: int) -> Type:
    if size < int(x.shape[dim]):
        raise ValueError(f"cannot pad {x.shape[dim]} to {size}")
    return Type((*x.shape[:dim], size, *x.shape[dim + 1 :]), x.format)


@op(_pad, weight=True)
def pad(x: Any, *, dim: int, size: int) -> Any:
    """Zeros behind along `dim`, up to `size`."""
    behind = [0, 0] * (x.dim() - 1 - dim) + [0, size - x.shape[dim]]
    return torch.nn.functional.pad(x, behind)


@op(lambda x: Type((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.format), weight=True)
def transpose(x: Any) -> Any:
    """Rows become columns, of each matrix where there are several."""
    return x.transpose(-1, -2)


def _reshape(x: Type, *, shape: tuple[int, ...]) -> Type:
    result = Type(shape, x.format)
    if result.nbytes() != x.nbytes():
        raise ValueError(f"{x} cannot become {result}")
    return result


@op(_reshape, weight=True)
def reshape(x: Any, *, shape: tuple[int, ...]) -> Any:
    """The same numbers in another shape."""
    return x.reshape(shape)


@op(lambda x, *, value: x, weight=True)
def shift(x: Any, *, value: float) -> Any:
    """x + value: norms that are stored as w - 1, or as w + 1."""
    return x.float() + value


@op(lambda x: x, weight=True)
def unit_rows(x: Any) -> Any:
    """Each row divided by its Euclidean norm: Baichuan 2's head, whose logits are cosines times the state's norm."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


def _mxfp4(blocks: Type, scales: Type, *, format: str) -> Type:
    if {blocks.format, scales.format} != {formats.U8} or blocks.shape != (*scales.shape, 16):
        raise ValueError(f"blocks {blocks} and scales {scales}, expected u8[...,16] and u8[...]")
    return Type((*scales.shape[:-1], 32 * int(scales.shape[-1])), formats.parse(format))


@op(_mxfp4, weight=True)
def mxfp4(blocks: Any, scales: Any, *, format: str) -> Any:
    """4-bit floats, two to a byte and the lower half first, times a power of two for each 32 of them: exact in bf16.

    A scale s means 2^(s - 127), and 255 no number. (OCP Microscaling Formats 1.0, 2023: MXFP4.)
    """
    half = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.bfloat16)
    each = torch.cat([half, -half])
    byte = torch.arange(256)
    both = torch.stack([each[byte & 15], each[byte >> 4]], -1)
    numbers = both[blocks.int()].flatten(-2)  # [...,G,32]
    return (numbers * scales.view(torch.float8_e8m0fnu).to(torch.bfloat16)[..., None]).flatten(-2)


@op(lambda *, shape, values: Type(shape, formats.F32), weight=True)
def literal(*, shape: tuple[int, ...], values: tuple[float, ...]) -> Any:
    """Numbers that follow from the spec, such as rope frequencies."""
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def _distances(x: Type, *, max_distance: int, behind: bool) -> Type:
    buckets, heads = (int(d) for d in x.shape)
    if max_distance <= (buckets >> behind) // 2 or (buckets >> behind) < 2:
        raise ValueError(f"{buckets} buckets do not end at distance {max_distance}")
    return Type((heads, (2 if behind else 1) * max_distance + 1), formats.F32)


@op(_distances, weight=True)
def distances(x: Any, *, max_distance: int, behind: bool) -> Any:
    """A bias of each of some buckets as one of each distance, f32[H,R], beyond the last of which it does not change.

    x: [buckets,H]. The first half of the buckets have a distance each, the others share logarithmically. R distances
    from 0 to max_distance; or with keys `behind` the query, of which the second half of the buckets is, from -that to
    that, negative for those before it. (Raffel et al. 2020; as Hugging Face's T5 rounds, in float32.)
    """
    apart = torch.arange(-max_distance, max_distance + 1) if behind else torch.arange(max_distance + 1)
    count = x.shape[0] >> behind
    exact, far = count // 2, apart.abs()
    share = torch.log(far.clamp_min(1).float() / exact) / math.log(max_distance / exact) * (count - exact)
    bucket = torch.where(far < exact, far, (exact + share.long()).clamp_max(count - 1))
    return x.float()[bucket + (apart > 0) * (count if behind else 0)].T


@op(lambda *, shape, format, **_: Type(shape, formats.parse(format)), weight=True)
def random(*, shape: tuple[int, ...], format: str, seed: int, std: float, mean: float = 0.0) -> Any:
    """Uniform numbers of the given mean and standard deviation; the same on every device for the same seed.

    For shapes without a checkpoint: benchmarks of a config alone. Made on torch's default device.
    """
    count = 1
    for size in shape:
        count *= size
    out = torch.empty(count, dtype=getattr(torch, formats.parse(format).torch_dtype))
    for start in range(0, count, 1 << 24):  # 64-bit numbers on the way: a few times 128 MiB
        counter = torch.arange(start, min(count, start + (1 << 24)))
        bits = mix(mix((counter + seed * GOLDEN) & MASK))
        unit = (bits >> 8).float() * 2.0**-23 - 1.0  # uniform in [-1, 1): standard deviation 1/sqrt(3)
        out[start : start + counter.numel()] = unit * (std * 3.0**0.5) + mean
    return out.reshape(shape)
