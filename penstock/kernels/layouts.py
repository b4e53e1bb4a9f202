"""How a weight is arranged. A layout is invertible, `unpack(pack(w)) == w`, so that it can be read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.kernels.tactic import PLAIN


@dataclass(frozen=True, slots=True)
class Layout:
    """Two functions on torch tensors that undo each other; the packed tensor has as many elements."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


_LAYOUTS: dict[str, Layout] = {PLAIN: Layout(lambda w: w, lambda w: w)}


def register(name: str, layout: Layout) -> None:
    """Make a layout known, for a tactic that reads it."""
    assert name not in _LAYOUTS, name
    _LAYOUTS[name] = layout


def known() -> Mapping[str, Layout]:
    return dict(_LAYOUTS)


def pack(name: str, weight: Any) -> Any:
    return _LAYOUTS[name].pack(weight)


def unpack(name: str, weight: Any) -> Any:
    return _LAYOUTS[name].unpack(weight)
