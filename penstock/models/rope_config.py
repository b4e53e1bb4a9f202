"""Rotary settings of a config, in any of the spellings in which they were published."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from penstock.models.config import MAX_SIZE, Reader
from penstock.spec import DynamicNtk, Linear, Llama3, LongRope, Rope, Scaling, Yarn, inverse_frequencies
from penstock.spec.rope import attention_factor


def read_rope(
    reader: Reader, head_dim: int, max_position: int, *,
    partial: float | None = None, interleaved: bool = False, theta: float = 10000.0,
) -> Rope:  # fmt: skip
    """The rope of a decoder whose config states `max_position` positions.

    Read are `rope_theta` beside `rope_scaling` (up to transformers 4, `type` or `rope_type`), and `rope_parameters`
    holding both (from 5). `partial`: the share of a head that is rotated where the config says nothing; None: the
    family has no such key. `theta` is the family's default. Raises ConfigError for a kind, key or value that is not
    implemented.
    """
    dim = head_dim if partial is None else rotated(reader, head_dim, partial)
    theta = reader.optional_number("rope_theta") or theta
    original = reader.optional_size("original_max_position_embeddings")
    old, new = reader.nested("rope_scaling"), reader.nested("rope_parameters")
    if old and new and reader.get("rope_scaling") != reader.get("rope_parameters"):
        raise reader.refused("rope_scaling", reader.get("rope_scaling"), "it or rope_parameters, not two that differ")
    nested = new or old
    if nested is None:
        return _sound(reader, Rope(theta, dim, interleaved=interleaved), max_position)
    if partial is None:
        nested.only("partial_rotary_factor", 1.0, None)
    nested.ignore(("partial_rotary_factor",))
    return replace(_nested(nested, dim, max_position, original, theta), interleaved=interleaved)


def read_ropes(
    reader: Reader, head_dim: int, max_position: int, thetas: Mapping[str, tuple[str, float]]
) -> dict[str, Rope]:
    """The rope of each type of layer, where `thetas` names the old key of its base and the default.

    Read are the old form, in which `rope_scaling` is of "full_attention" alone, and `rope_parameters` with an object
    for each type (transformers 5).
    """
    bases = {kind: reader.optional_number(key) or default for kind, (key, default) in thetas.items()}
    stated = reader.nested("rope_parameters")
    types = {kind: stated.nested(kind) if stated else None for kind in thetas}
    if not any(types.values()):
        plain = {kind: _sound(reader, Rope(theta, head_dim), max_position) for kind, theta in bases.items()}
        full = read_rope(reader, head_dim, max_position, theta=bases["full_attention"])
        return plain | {"full_attention": full}
    assert stated
    stated.close()
    reader.only("rope_scaling", None)
    return {k: _nested(r, head_dim, max_position, None, bases[k]) if r else Rope(bases[k], head_dim)
            for k, r in types.items()}  # fmt: skip


def _nested(reader: Reader, dim: int, max_position: int, original: int | None, theta: float) -> Rope:
    """Everything that one object says."""
    theta = reader.optional_number("rope_theta") or theta
    scaling = _KINDS[_kind(reader)](reader, dim, max_position, original)
    reader.close()
    return _sound(reader, Rope(theta, dim, scaling), max_position)


def _sound(reader: Reader, rope: Rope, max_position: int) -> Rope:
    """The rope, whose numbers may each be right and give angles beyond any float, or none, together."""
    try:
        reached = reach(rope, max_position)
        angles = [angle for length in (None, reached) for angle in inverse_frequencies(rope, length)]
        sound = all(map(math.isfinite, (attention_factor(rope), *angles))) and reached <= MAX_SIZE
    except (ArithmeticError, ValueError):
        sound = False
    if not sound:
        raise reader.refused("rope_theta", rope.theta, f"a base and a scaling that give angles, not {rope.scaling}")
    return rope


def rotated(reader: Reader, head_dim: int, default: float) -> int:
    """How many numbers of each head are rotated: the whole part of the config's share of it, which must be even."""
    nested = reader.nested("rope_parameters") or reader.nested("rope_scaling")
    own = nested.optional_number("partial_rotary_factor") if nested else None
    beside = reader.optional_number("partial_rotary_factor")
    share = own or beside or default
    dim = int(head_dim * min(share, 2.0))
    if dim % 2 or not 0 < dim <= head_dim:
        raise reader.refused("partial_rotary_factor", share, f"a share of heads of {head_dim} that is an even number")
    return dim


def reach(rope: Rope, max_position: int) -> int:
    """The longest sequence that the scaling is meant for, where the config's own figure is the length before it."""
    match rope.scaling:
        case DynamicNtk(factor, original) | Yarn(factor, original):
            return max(max_position, int(factor * original))
    return max_position


def _kind(nested: Reader) -> str:
    old = nested.get("type", None)
    value = nested.get("rope_type", None) or old or "default"
    if value == "default" and nested.get("factor", None) is not None:
        raise nested.refused("rope_type", nested.get("rope_type", None), "a kind that has a factor")
    if not isinstance(value, str) or value not in _KINDS:
        raise nested.refused("rope_type", value, f"one of {', '.join(_KINDS)}")
    if old is not None and old != value:
        raise nested.refused("type", old, f"the same as rope_type, {value!r}")
    return value


def _default(r: Reader, dim: int, limit: int, original: int | None) -> None:
    return None


def _linear(r: Reader, dim: int, limit: int, original: int | None) -> Linear:
    return Linear(r.number("factor"))


def _dynamic(r: Reader, dim: int, limit: int, original: int | None) -> DynamicNtk:
    return DynamicNtk(r.number("factor"), limit)


def _llama3(r: Reader, dim: int, limit: int, original: int | None) -> Llama3:
    low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
    if high <= low:
        raise r.refused("high_freq_factor", high, f"more than low_freq_factor = {low}")
    return Llama3(r.number("factor"), low, high, _original(r, limit, original))


def _yarn(r: Reader, dim: int, limit: int, original: int | None) -> Yarn:
    r.ignore(("finetuned",))  # a note about training: the published YaRN checkpoints say so, their own code ignores it
    before = _original(r, limit, original)
    return Yarn(
        r.optional_number("factor") or limit / before,
        before,
        r.optional_number("beta_fast") or 32.0,
        r.optional_number("beta_slow") or 1.0,
        r.flag("truncate", True),
        r.optional_number("mscale") or 0.0,
        r.optional_number("mscale_all_dim") or 0.0,
        r.optional_number("attention_factor"),
    )


def _longrope(r: Reader, dim: int, limit: int, original: int | None) -> LongRope:
    before = _original(r, limit, original)
    short, long = r.numbers("short_factor", dim // 2), r.numbers("long_factor", dim // 2)
    factor = r.optional_number("factor") or limit / before
    return LongRope(factor, before, short, long, r.optional_number("attention_factor"))


def _original(r: Reader, limit: int, original: int | None) -> int:
    """The length before scaling: a key beside the rope's own goes first, as in transformers."""
    own = r.optional_size("original_max_position_embeddings", limit)
    return original or own or limit


_KINDS: Mapping[str, Callable[[Reader, int, int, int | None], Scaling | None]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # its name in the first files of Phi-3
}
