"""Frozen records to JSON values and back. A record is an object whose "kind" names its class."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from penstock.errors import ModelError

T = TypeVar("T")
_KINDS: dict[str, type[Any]] = {}


def kind(cls: type[T]) -> type[T]:
    """Make a record class readable by its name."""
    assert cls.__name__ not in _KINDS, cls.__name__
    _KINDS[cls.__name__] = cls
    return cls


def dump(value: Any) -> Any:
    """JSON values of a record, a tuple, or a plain value."""
    if is_dataclass(value):
        return {"kind": type(value).__name__} | {f.name: dump(getattr(value, f.name)) for f in fields(value)}
    return [dump(v) for v in value] if isinstance(value, tuple) else value


def load(data: Any) -> Any:
    """The inverse of `dump`. Raises ModelError for an unknown kind or field."""
    if isinstance(data, list):
        return tuple(load(v) for v in data)
    if not isinstance(data, dict):
        return data
    cls = _KINDS.get(data.get("kind", ""))
    if cls is None:
        raise ModelError(f"spec record of kind {data.get('kind')!r}; known are {', '.join(sorted(_KINDS))}")
    names = {f.name for f in fields(cls)}
    if unknown := data.keys() - names - {"kind"}:
        raise ModelError(f"spec record {cls.__name__} has unknown fields {sorted(unknown)}; known are {sorted(names)}")
    try:
        return cls(**{name: load(value) for name, value in data.items() if name != "kind"})
    except TypeError as error:
        raise ModelError(f"spec record {cls.__name__} is incomplete: {error}") from None
