"""Rotary settings of a config, in any of the spellings in which they were published."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from penstock.models.config import Reader
from penstock.spec import DynamicNtk, Linear, Llama3, LongRope, Rope, Scaling, Yarn


def read_rope(
    reader: Reader, head_dim: int, max_position: int, *, partial: float | None = None, interleaved: bool = False
) -> Rope:
    """The rope of a decoder whose config states `max_position` positions.

    Read are `rope_theta` beside `rope_scaling` (up to transformers 4, `type` or `rope_type`), and `rope_parameters`
    holding both (from 5). `partial`: the share of a head that is rotated where the config says nothing; None: the
    family has no such key. Raises ConfigError for a kind, key or value that is not implemented.
    """
    dim = head_dim if partial is None else rotated(reader, head_dim, partial)
    theta = reader.optional_number("rope_theta")
    original = reader.optional_size("original_max_position_embeddings")
    old, new = reader.nested("rope_scaling"), reader.nested("rope_parameters")
    if old and new and reader.get("rope_scaling") != reader.get("rope_parameters"):
        raise reader.refused("rope_scaling", reader.get("rope_scaling"), "it or rope_parameters, not two that differ")
    nested = new or old
    if nested is None:
        return Rope(theta or 10000.0, dim, interleaved=interleaved)
    theta = nested.optional_number("rope_theta") or theta or 10000.0
    if partial is None:
        nested.only("partial_rotary_factor", 1.0, None)
    nested.ignore(("partial_rotary_factor",))
    scaling = _KINDS[_kind(nested)](nested, dim, max_position, original)
    nested.close()
    return Rope(theta, dim, scaling, interleaved)


def rotated(reader: Reader, head_dim: int, default: float) -> int:
    """How many numbers of each head are rotated: the whole part of the config's share of it, which must be even."""
    nested = reader.nested("rope_parameters") or reader.nested("rope_scaling")
    own = nested.optional_number("partial_rotary_factor") if nested else None
    beside = reader.optional_number("partial_rotary_factor")
    share = own or beside or default
    dim = int(head_dim * share)
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
    if value not in _KINDS:
        raise nested.refused("rope_type", value, f"one of {', '.join(_KINDS)}")
    if old is not None and old != value:
        raise nested.refused("type", old, f"the same as rope_type, {value!r}")
    return str(value)


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
}
