"""Checkpoints that store q, k and v, or gate and up, in one tensor, one after another."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.ir import Value
from penstock.models.binding import Source, Wanted
from penstock.models.storage import part


def one_of(wanted: Wanted, name: str, sizes: Sequence[int], index: int) -> Value:
    """Part `index` of the checkpoint's tensor `name`, whose rows are `sizes` one after another."""
    return part(wanted.tensor(name, sum(sizes), *wanted.shape[1:]), sizes, index)


def qkv(wanted: Wanted, name: str) -> Value:
    """The query, key or value rows that `wanted`, attention.q.weight or such, is."""
    mixer = wanted.attention
    sizes = [heads * mixer.head_dim for heads in (mixer.heads, mixer.kv_heads, mixer.kv_heads)]
    return one_of(wanted, name, sizes, "qkv".index(wanted.part.split(".")[1]))


def gate_up(wanted: Wanted, name: str, first: str = "gate") -> Value:
    """One half of a feed-forward's first product; `first` says which one comes first."""
    return one_of(wanted, name, wanted.shape[:1] * 2, int(wanted.part.split(".")[1] != first))


def fusing(rest: Source, qkv_name: str = "", gate_up_name: str = "", first: str = "gate") -> Source:
    """The checkpoint's names where "{}" of them is the layer, for what is fused; `rest` for all else."""

    def source(wanted: Wanted) -> Value | str:
        match wanted.part.split("."):
            case ["attention", "q" | "k" | "v", kind] if qkv_name:
                return qkv(wanted, f"{qkv_name.format(wanted.layer)}.{kind}")
            case ["feedforward", "gate" | "up", kind] if gate_up_name:
                return gate_up(wanted, f"{gate_up_name.format(wanted.layer)}.{kind}", first)
        return rest(wanted)

    return source
