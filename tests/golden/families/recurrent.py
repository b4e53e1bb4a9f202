"""Mixers that keep a state by slot, a tiny model of each form."""

from __future__ import annotations

from penstock.spec import LayerSpec, ModelSpec, Norm, StateSpace

_NORM = Norm(1e-5)
_LAYER = LayerSpec(StateSpace(8, 8, 16, 2, 4, "silu", 1e-5), None, _NORM, None)

FAMILIES: dict[str, ModelSpec] = {"mamba2": ModelSpec((_LAYER,) * 2, 48, 32, _NORM, 64, tied_head=True)}
