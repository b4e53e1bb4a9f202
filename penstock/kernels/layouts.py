"""How a weight is arranged. A layout is invertible, `unpack(pack(w)) == w`, so that it can be read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from penstock import plugins
from penstock.errors import PluginError
from penstock.kernels.tactic import PLAIN


@dataclass(frozen=True, slots=True)
class Layout:
    """Two functions on torch tensors that undo each other; the packed tensor has as many elements."""

    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]


_LAYOUTS: dict[str, Layout] = {PLAIN: Layout(lambda w: w, lambda w: w)}


def register(name: str, layout: Layout) -> None:
    """Make a layout known, for a tactic that reads it. Raises PluginError for a name that is taken."""
    plugins.note("layout", name, name in _LAYOUTS, lambda: _LAYOUTS.pop(name))
    _LAYOUTS[name] = layout


def known() -> Mapping[str, Layout]:
    return dict(_LAYOUTS)


def pack(name: str, weight: Any) -> Any:
    return _layout(name).pack(weight)


def unpack(name: str, weight: Any) -> Any:
    return _layout(name).unpack(weight)


def _layout(name: str) -> Layout:
    if name not in _LAYOUTS:
        from penstock.kernels.registry import builtin

        builtin()  # a tactic's module registers the layout that it reads
    if name not in _LAYOUTS:
        raise PluginError(f"layout {name!r} is unknown; load the plugin whose tactic reads it")
    return _LAYOUTS[name]
