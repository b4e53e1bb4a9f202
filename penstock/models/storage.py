"""How checkpoints store what we name apart: fused, transposed, interleaved by head, one tensor for each expert."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.ir import Value, emit
from penstock.models.binding import Wanted


def rows(x: Value, start: int, stop: int, dim: int = 0) -> Value:
    """Rows start to stop along `dim`."""
    return emit("slice", x, dim=dim, start=start, stop=stop)[0]


def cut(x: Value, start: int, stop: int) -> Value:
    """The same of the first dimension; x itself where those are all of its rows."""
    return x if (start, stop) == (0, x.type.shape[0]) else rows(x, start, stop)


def joined(parts: Sequence[Value], dim: int) -> Value:
    """The parts one after another along `dim`; a single one as it is."""
    return parts[0] if len(parts) == 1 else emit("concat", *parts, dim=dim)[0]


def part(x: Value, sizes: Sequence[int], index: int, dim: int = 0) -> Value:
    """One of several parts that lie one after another along `dim`: q, k or v of a fused matrix or bias."""
    start = sum(sizes[:index])
    return rows(x, start, start + sizes[index], dim)


def by_group(x: Value, groups: int, sizes: Sequence[int], index: int) -> Value:
    """The same where each of `groups` has its own parts side by side: [groups * sum(sizes), ...], `sizes` of one group.

    Per-head fused projections: a group is a KV head, with its queries first.
    """
    rest = x.type.shape[1:]
    grouped = emit("reshape", x, shape=(groups, sum(sizes), *rest))[0]
    return emit("reshape", part(grouped, sizes, index, dim=1), shape=(groups * sizes[index], *rest))[0]


def transposed(x: Value) -> Value:
    """[in, out] as it multiplies from the right, to [out, in]."""
    return emit("transpose", x)[0]


def fused_qkv(wanted: Wanted, name: str, *, grouped: bool = False, flipped: bool = False) -> Value:
    """The q, k or v that is `wanted`, of one tensor with all rows of q, then k, then v.

    `grouped`: by KV head, each with its queries first. `flipped`: the matrix multiplies from the right.
    """
    mixer = wanted.attention
    kv_heads, size = mixer.kv_heads, mixer.head_dim
    sizes, index = (mixer.heads * size, kv_heads * size, kv_heads * size), "qkv".index(wanted.part.split(".")[1])
    if flipped and len(wanted.shape) == 2:
        x = transposed(wanted.tensor(name, wanted.shape[1], sum(sizes)))
    else:
        x = wanted.tensor(name, sum(sizes), *wanted.shape[1:])
    if grouped and kv_heads > 1:
        return by_group(x, kv_heads, [s // kv_heads for s in sizes], index)
    return part(x, sizes, index)


def constant(wanted: Wanted, value: float) -> Value:
    """A weight that the model has not, and that is this number everywhere."""
    return emit("random", shape=wanted.shape, format=wanted.format, seed=0, std=0.0, mean=value)[0]


def stacked(parts: Sequence[Value]) -> Value:
    """Equal tensors as one with a new first dimension: norms that are stored head by head."""
    return emit("reshape", emit("concat", *parts, dim=0)[0], shape=(len(parts), *parts[0].type.shape))[0]
