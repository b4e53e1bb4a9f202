"""The phases of a decode step around the model: expanding the upload before it, sampling and committing after it."""

from __future__ import annotations

from penstock.engine.profile import Profile
from penstock.ir.graph import Graph, Value, leaf, tensor
from penstock.ir.op import emit
from penstock.ir.ops.state import PREPARED

SAMPLING = ("temperature", "top_k", "top_p", "seed", "sample_position")


def prepare_graph(profile: Profile) -> Graph:
    """slots, upload -> everything that the forward pass and sampling read, under the names of PREPARED."""
    node = emit("prepare", _slots(profile), _upload(), **profile.slots.attrs())
    return Graph(node.outputs, PREPARED[: len(node.types)])


def sample_graph(profile: Profile, vocab_size: int) -> Graph:
    """logits and sampling parameters -> "sampled" i32[L], committed to the slots."""
    logits = leaf("input", "logits", tensor("f32", "L", vocab_size))
    kinds = {"temperature": "f32", "top_p": "f32"}
    params = [leaf("input", name, tensor(kinds.get(name, "i32"), "L")) for name in SAMPLING]
    sampled = emit("sample", logits, *params)[0]
    slots = emit("commit", _slots(profile), _upload(), sampled, **profile.slots.attrs())[0]
    return Graph((sampled, slots), ("sampled", "slots"))


def _slots(profile: Profile) -> Value:
    return leaf("state", "slots", tensor("i32", profile.slots.size))


def _upload() -> Value:
    return leaf("input", "upload", tensor("i32", "U"))
