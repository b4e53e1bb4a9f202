"""Everything between the qkv product and attention in one op."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.compiler.passes.patterns import option, width
from penstock.ir import Graph, Node, Value, emit
from penstock.ir.graph import Attr
from penstock.ir.rewrite import Match, Rule, Swap


@dataclass(frozen=True, slots=True)
class Rotated:
    """A value on its way from the split to the cache: perhaps normalised by head, then rotated."""

    rope: Node
    norm: Node | None
    source: Value

    @classmethod
    def of(cls, value: Value) -> Rotated | None:
        if value.node.op != "rope":
            return None
        inner = value.node.inputs[0]
        norm = inner.node if inner.node.op == "head_rms_norm" else None
        return cls(value.node, norm, norm.inputs[0] if norm else inner)

    def like(self, other: Rotated) -> bool:
        """Same angles, same normalisation but for its weight."""
        return (
            self.rope.inputs[1:] == other.rope.inputs[1:]
            and _turn(self.rope) == _turn(other.rope)
            and _norm_attrs(self.norm) == _norm_attrs(other.norm)
        )


def fuse_rope(m: Match) -> Swap | None:
    """split, head norms, rope of q and of k, kv_append: rope_append. Its results are q and the cache."""
    if m.node.op != "kv_append" or not (found := _queries_and_keys(m)):
        return None
    q, k = found
    kv, _, _, positions, rows, table = m.node.inputs
    norms = tuple(r.norm.inputs[1] for r in (q, k) if r.norm)
    attrs = {"heads": q.rope.attr("heads"), **_turn(q.rope), **_norm_attrs(q.norm)}
    operands = (q.source.node.inputs[0], kv, positions, q.rope.inputs[2], rows, table, *norms)
    fused = emit("rope_append", *operands, **attrs)
    return {q.rope[0]: fused[0], m.node[0]: fused[1]}


def clip_whole(m: Match) -> Swap | None:
    """Every part of a split clipped alike, and read by nothing else: what is split is clipped."""
    clips = [user for v in m.node.outputs if (user := m.only_user(v)) and user.op == "clip"]
    alike = {clip.attrs for clip in clips}
    if m.node.op != "split" or len(clips) != len(m.node.outputs) or len(alike) != 1:
        return None
    whole = emit("clip", m.node.inputs[0], **dict(alike.pop()))[0]
    parts = emit("split", whole, sizes=m.node.attr("sizes")).outputs
    return {clip[0]: part for clip, part in zip(clips, parts, strict=True)}


def _queries_and_keys(m: Match) -> tuple[Rotated, Rotated] | None:
    """Both rotated values of an append, where they and its values are one split's parts and are treated alike."""
    kv, keys, values, positions, rows, _ = m.node.inputs
    split, k = values.node, Rotated.of(keys)
    if split.op != "split" or len(split.outputs) != 3 or values.index != 2 or not k or k.source != split[1]:
        return None
    q = _rotated_reader(m, split[0])
    if not q or not q.like(k) or (k.rope.inputs[1], k.rope.inputs[3]) != (positions, rows):
        return None
    fits = q.rope.attr("heads") * kv.type.shape[4] == width(split[0]) and k.rope.attr("heads") == kv.type.shape[2]
    return (q, k) if fits else None


def _rotated_reader(m: Match, value: Value) -> Rotated | None:
    user = m.only_user(value)
    if user and user.op == "head_rms_norm":
        user = m.only_user(user[0])
    return Rotated.of(user[0]) if user and user.op == "rope" else None


def _turn(rope: Node) -> dict[str, Attr]:
    """How a rope turns, whatever its heads and its angles."""
    return {"scale": 1.0, **{k: v for k, v in rope.attrs if k == "scale" or (k == "interleaved" and v)}}


def _norm_attrs(norm: Node | None) -> dict[str, float]:
    return {"eps": option(norm, "eps", 0.0), "offset": option(norm, "offset", 0.0)} if norm else {}


def must(graph: Graph) -> int:
    """Once for each append whose operands come, alike, from one split in three, or split whose parts are clipped."""
    matches = [Match(n, graph) for n in graph.nodes]
    appends = sum(m.node.op == "kv_append" and _queries_and_keys(m) is not None for m in matches)
    return appends + sum(clip_whole(m) is not None for m in matches)


RULES: tuple[Rule, ...] = (clip_whole, fuse_rope)
