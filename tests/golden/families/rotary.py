"""Gemma 2 and 3, Phi-3, OLMo 2, Granite, Command-R, GLM-4; Qwen 1, Baichuan, ChatGLM."""

from __future__ import annotations

from dataclasses import replace

from penstock.spec import (
    Alibi,
    Attention,
    LayerNorm,
    LayerSpec,
    Linear,
    LongRope,
    Mlp,
    ModelSpec,
    Norm,
    Rope,
    alibi_slopes,
)

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


_NORM, _CENTRED = Norm(1e-5), LayerNorm(1e-5, bias=False)
_LONG = Rope(10000.0, 6, LongRope(4.0, 32, (1.0, 1.5, 2.0), (1.0, 4.0, 8.0)))
_PAIRS, _HALF = Rope(10000.0, 8, interleaved=True), Rope(10000.0, 4, interleaved=True)
_BIASED = replace(_ATTENTION, kv_heads=4, rope=None, bias=Alibi(alibi_slopes(4)))


def _beside(mixer: Attention) -> LayerSpec:
    return LayerSpec(mixer, _SILU, _CENTRED, None, residual="parallel")


def _parallel(*mixers: Attention) -> ModelSpec:
    return _model(*map(_beside, mixers), final_norm=_CENTRED, tied_head=True, logit_scale=0.25)


_PLANAR = Attention(4, 4, 8, 8**-0.5, Rope(10000.0, 4, planar=True), qkv_bias=True, out_bias=True, prefix=True)
_WHOLE = LayerNorm(1e-5)


def _from_norms(mixer: Attention) -> LayerSpec:
    """The stream goes on from each norm, twice as large."""
    mlp = Mlp(64, "gelu_tanh", bias=True, gated=False)
    return LayerSpec(mixer, mlp, _WHOLE, _WHOLE, residual="normed", residual_scale=2.0)


FAMILIES: dict[str, ModelSpec] = {
    "chatglm6b": _model(*[_from_norms(_PLANAR)] * 2, final_norm=_WHOLE, tied_head=True),
    "gemma2": _model(_sandwich(replace(_CAPPED, window=6)), _sandwich(_CAPPED), **_SCALED, logit_softcap=30.0),
    "gemma3": _model(
        _sandwich(replace(_NORMED, window=6)),
        _sandwich(replace(_NORMED, rope=Rope(1e6, 8, Linear(8.0)))),
        **_SCALED,
    ),
    "phi3": _model(*[LayerSpec(replace(_ATTENTION, rope=_LONG, window=6), _SILU, _NORM, _NORM)] * 2),
    "olmo2": _model(
        *[LayerSpec(replace(_ATTENTION, qk_norm=_NORM, qk_norm_over="row"), _SILU, None, None, _NORM, _NORM)] * 2
    ),
    "granite": _model(
        *[LayerSpec(replace(_ATTENTION, scale=0.1), _SILU, _NORM, _NORM, residual_scale=0.22)] * 2,
        embedding_scale=12.0,
        logit_scale=0.125,
    ),
    "cohere": _parallel(*[replace(_ATTENTION, rope=_PAIRS, qk_norm=_CENTRED, qk_norm_over="heads")] * 2),
    "cohere2": _parallel(replace(_ATTENTION, rope=_PAIRS, window=6), replace(_ATTENTION, rope=None)),
    "glm4": _model(*[LayerSpec(replace(_ATTENTION, rope=_HALF, qkv_bias=True), _SILU, _NORM, _NORM, _NORM, _NORM)] * 2),
    "glm": _model(*[LayerSpec(replace(_ATTENTION, rope=_HALF, qkv_bias=True), _SILU, _NORM, _NORM)] * 2),
    "qwen": _model(*[LayerSpec(replace(_ATTENTION, kv_heads=4, qkv_bias=True), _SILU, _NORM, _NORM)] * 2),
    "baichuan": _model(*[LayerSpec(replace(_ATTENTION, kv_heads=4), _SILU, _NORM, _NORM)] * 2),
    "baichuan13b": _model(*[LayerSpec(_BIASED, _SILU, _NORM, _NORM)] * 2),
}
