"""T5 and BART."""

from __future__ import annotations

from penstock.spec import Attention, EncoderSpec, LayerNorm, LayerSpec, Mlp, ModelSpec, Norm, RelativeBias

_RMS, _NORM = Norm(1e-6), LayerNorm(1e-5)
_UNSCALED, _BIASED = Attention(4, 4, 12, 1.0), Attention(4, 4, 8, 8**-0.5, qkv_bias=True, out_bias=True)


def t5(mlp: Mlp, **head: object) -> ModelSpec:
    """Two layers each side, E = 32, V = 48."""
    mixer = Attention(4, 4, 12, 1.0, bias=RelativeBias(8, 20))
    layer = LayerSpec(mixer, mlp, _RMS, _RMS)
    looking = LayerSpec(mixer, mlp, _RMS, _RMS, cross=_UNSCALED, cross_norm=_RMS)
    encoder = EncoderSpec((layer,) * 2, _RMS)
    return ModelSpec((looking,) * 2, 48, 32, _RMS, 64, encoder=encoder, **head)  # type: ignore[arg-type]


def bart() -> ModelSpec:
    mlp = Mlp(64, "gelu", bias=True, gated=False)
    layer = LayerSpec(_BIASED, mlp, _NORM, _NORM, residual="post")
    looking = LayerSpec(_BIASED, mlp, _NORM, _NORM, residual="post", cross=_BIASED, cross_norm=_NORM)
    return ModelSpec(
        (looking,) * 2, 48, 32, None, 64, tied_head=True, embedding_norm=_NORM, learned_positions=64, head_bias=True,
        encoder=EncoderSpec((layer,) * 2, None, _NORM, 64),
    )  # fmt: skip


FAMILIES: dict[str, ModelSpec] = {
    "t5": t5(Mlp(64, "relu", gated=False), tied_head=True, logit_scale=32**-0.5),
    "t5_v1_1": t5(Mlp(64, "gelu_tanh")),
    "bart": bart(),
}
