"""Mixers that keep a state by slot, a tiny model of each form."""

from __future__ import annotations

from penstock.spec import Attention, DeltaNet, LayerSpec, Mlp, ModelSpec, Moe, Norm, Rope, Router, StateSpace

_NORM = Norm(1e-5)
_LAYER = LayerSpec(StateSpace(8, 8, 16, 2, 4, "silu", 1e-5), None, _NORM, None)

_UP = Norm(1e-6, offset=1.0)
_MIXERS = (
    DeltaNet(4, 8, 2, 8, 4, "silu", 1e-6),
    Attention(4, 2, 8, 8**-0.5, Rope(1e6, 4), qk_norm=_UP, gated=True),
)
_EXPERT = Mlp(24, "silu")
_EXPERTS = Moe(Router(6, 3, renormalize=1.0), _EXPERT, _EXPERT, shared_gate=True)

FAMILIES: dict[str, ModelSpec] = {
    "mamba2": ModelSpec((_LAYER,) * 2, 48, 32, _NORM, 64, tied_head=True),
    "qwen3_next": ModelSpec(tuple(LayerSpec(mixer, _EXPERTS, _UP, _UP) for mixer in _MIXERS), 48, 32, _UP, 64),
}
