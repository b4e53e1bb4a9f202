"""Gemma 2 and 3."""

from __future__ import annotations

from dataclasses import replace

from penstock.spec import Attention, LayerSpec, Linear, Mlp, ModelSpec, Norm, Rope

_ATTENTION = Attention(4, 2, 8, 8**-0.5, Rope(10000.0, 8))
_SILU = Mlp(64, "silu")


def _model(*layers: LayerSpec, **rest: object) -> ModelSpec:
    """E = 32, V = 48."""
    defaults = {"vocab_size": 48, "hidden_size": 32, "final_norm": Norm(1e-6), "max_position": 64}
    return ModelSpec(layers, **(defaults | rest))  # type: ignore[arg-type]


_ONE = Norm(1e-6, offset=1.0)
_TANH = Mlp(64, "gelu_tanh")
_CAPPED = replace(_ATTENTION, softcap=50.0)
_NORMED = replace(_ATTENTION, qk_norm=_ONE)
_SCALED = {"final_norm": _ONE, "tied_head": True, "embedding_scale": 32**0.5}


def _sandwich(mixer: Attention) -> LayerSpec:
    return LayerSpec(mixer, _TANH, _ONE, _ONE, _ONE, _ONE)


FAMILIES: dict[str, ModelSpec] = {
    "gemma2": _model(_sandwich(replace(_CAPPED, window=6)), _sandwich(_CAPPED), **_SCALED, logit_softcap=30.0),
    "gemma3": _model(
        _sandwich(replace(_NORMED, window=6)),
        _sandwich(replace(_NORMED, rope=Rope(1e6, 8, Linear(8.0)))),
        **_SCALED,
    ),
}
