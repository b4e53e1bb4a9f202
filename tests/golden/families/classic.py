"""GPT-2 and its contemporaries."""

from __future__ import annotations

from dataclasses import replace

from penstock.spec import Alibi, Attention, LayerNorm, LayerSpec, Mlp, ModelSpec, Rope, alibi_slopes

NORM, BARE = LayerNorm(1e-5), LayerNorm(1e-5, bias=False)
BIASED = Mlp(64, "gelu_tanh", bias=True, gated=False)
PLAIN = Mlp(64, "gelu", gated=False)
ALIBI = Alibi(alibi_slopes(4))


def mixer(kv_heads: int = 4, *, biases: bool = True, **changes: object) -> Attention:
    """H = 4, D = 8."""
    return Attention(4, kv_heads, 8, 8**-0.5, qkv_bias=biases, out_bias=biases, **changes)  # type: ignore[arg-type]


def model(layer: LayerSpec, **rest: object) -> ModelSpec:
    """Two equal layers, E = 32, V = 48."""
    defaults = {"vocab_size": 48, "hidden_size": 32, "final_norm": layer.mixer_norm, "max_position": 64}
    return ModelSpec((layer,) * 2, **(defaults | rest))  # type: ignore[arg-type]


SERIAL = LayerSpec(mixer(), BIASED, NORM, NORM)
ONE_NORM = LayerSpec(mixer(), BIASED, NORM, None, residual="parallel")

FAMILIES: dict[str, ModelSpec] = {
    "gpt2": model(SERIAL, tied_head=True, learned_positions=64),
    "gpt_neox": model(
        LayerSpec(mixer(rope=Rope(10000.0, 2)), replace(BIASED, act="gelu"), NORM, NORM, residual="parallel")
    ),
    "gptj": model(
        replace(ONE_NORM, mixer=mixer(biases=False, rope=Rope(10000.0, 4, interleaved=True))), head_bias=True
    ),
    "opt-350m": model(
        LayerSpec(mixer(), replace(BIASED, act="relu"), NORM, NORM, residual="post"),
        tied_head=True, learned_positions=64, embedding_size=16, final_norm=None,
    ),
    "phi": model(replace(ONE_NORM, mixer=mixer(rope=Rope(10000.0, 4))), head_bias=True),
    "starcoder2": model(replace(SERIAL, mixer=mixer(2, rope=Rope(1e6, 8), window=6)), tied_head=True),
    "falcon-7b": model(
        LayerSpec(mixer(1, biases=False, rope=Rope(10000.0, 8)), PLAIN, NORM, None, residual="parallel"), tied_head=True
    ),
    "falcon-40b": model(
        LayerSpec(mixer(2, biases=False, rope=Rope(10000.0, 8)), PLAIN, NORM, NORM, residual="parallel"), tied_head=True
    ),
    "bloom": model(replace(SERIAL, mixer=mixer(bias=ALIBI)), tied_head=True, embedding_norm=NORM),
    "mpt": model(
        LayerSpec(mixer(biases=False, bias=ALIBI, clip=6.0), PLAIN, BARE, BARE), tied_head=True, logit_scale=32**-0.5
    ),
}  # fmt: skip
