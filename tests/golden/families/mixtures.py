"""Mixtures of experts, a tiny model of each form."""

from __future__ import annotations

from penstock.spec import Attention, Latent, LayerNorm, LayerSpec, Mlp, ModelSpec, Moe, Norm, Rope, Router

_ROPE, _NORM, _PLAIN = Rope(1e6, 8), Norm(1e-5), LayerNorm(1e-5, bias=False)
_LATENT = Latent(4, 24, 16, 8, 24**-0.5, Rope(1e4, 8, interleaved=True), query_rank=24)
_GROUPS = Router(8, 3, "sigmoid", renormalize=1.0, factor=2.5, correction=True, groups=4, kept_groups=2, group_top=2)
_EXPERT = Mlp(24, "silu")
_CLAMPED = Moe(Router(4, 2, "top_softmax", bias=True), Mlp(24, "swiglu_clamped", bias=True, limit=7.0))


def _model(layer: LayerSpec, **facts: object) -> ModelSpec:
    return ModelSpec((layer,) * 2, 48, 32, layer.mixer_norm, 64, **facts)  # type: ignore[arg-type]


def _attention(**changes: object) -> Attention:
    return Attention(4, 2, 8, 8**-0.5, _ROPE, **changes)  # type: ignore[arg-type]


FAMILIES: dict[str, ModelSpec] = {
    "mixtral": _model(LayerSpec(_attention(), Moe(Router(4, 2, renormalize=1.0), _EXPERT), _NORM, _NORM)),
    "qwen2_moe": _model(
        LayerSpec(
            _attention(qkv_bias=True), Moe(Router(6, 2), _EXPERT, Mlp(40, "silu"), shared_gate=True), _NORM, _NORM
        )
    ),
    "qwen3_moe": _model(
        LayerSpec(_attention(qk_norm=Norm(1e-6)), Moe(Router(8, 3, renormalize=1.0), _EXPERT), _NORM, _NORM)
    ),
    "dbrx": _model(
        LayerSpec(_attention(clip=8.0), Moe(Router(4, 2, renormalize=1.0), _EXPERT), _PLAIN, _PLAIN),
    ),
    "gpt_oss": ModelSpec(
        tuple(
            LayerSpec(_attention(qkv_bias=True, out_bias=True, sinks=True, window=window), _CLAMPED, _NORM, _NORM)
            for window in (6, 0)
        ),
        *(48, 32, _NORM, 64),
    ),
    "deepseek_v3": ModelSpec(
        (
            LayerSpec(_LATENT, Mlp(64, "silu"), _NORM, _NORM),
            LayerSpec(_LATENT, Moe(_GROUPS, _EXPERT, Mlp(24, "silu")), _NORM, _NORM),
        ),
        *(48, 32, _NORM, 64),
    ),
    "grok1": _model(
        LayerSpec(_attention(softcap=30.0), Moe(Router(4, 2), Mlp(24, "gelu")), _NORM, _NORM, _NORM, _NORM),
        tied_head=True,
        embedding_scale=78.38367176906169,
        logit_scale=0.5773502691896257,
    ),
}
