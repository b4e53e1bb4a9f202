"""Checkpoints that store q, k and v, or gate and up, in one tensor, one after another."""

from __future__ import annotations

from penstock.ir import Value
from penstock.models.binding import Source, Wanted
from penstock.models.storage import fused_qkv, part


def gate_up(wanted: Wanted, name: str, first: str = "gate") -> Value:
    """One half of a feed-forward's first product; `first` says which one comes first."""
    sizes = wanted.shape[:1] * 2
    whole = wanted.tensor(name, sum(sizes), *wanted.shape[1:])
    return part(whole, sizes, int(wanted.part.split(".")[1] != first))


def fusing(rest: Source, qkv_name: str = "", gate_up_name: str = "", first: str = "gate") -> Source:
    """The checkpoint's names where "{}" of them is the layer, for what is fused; `rest` for all else."""

    def source(wanted: Wanted) -> Value | str:
        match wanted.part.split("."):
            case ["attention", "q" | "k" | "v", kind] if qkv_name:
                return fused_qkv(wanted, f"{qkv_name.format(wanted.layer)}.{kind}")
            case ["feedforward", "gate" | "up", kind] if gate_up_name:
                return gate_up(wanted, f"{gate_up_name.format(wanted.layer)}.{kind}", first)
        return rest(wanted)

    return source
