"""What the decoder families of Hugging Face's naming have in common: most keys, and the names of all tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from penstock.models.binding import Source, Wanted
from penstock.models.config import IGNORED, MAX_SIZE, NEUTRAL, Reader
from penstock.models.rope_config import reach, read_rope
from penstock.spec import AnyAttention, AnyNorm, Attention, FeedForward, LayerSpec, ModelSpec, Norm

SILU = {"silu": "silu", "swish": "silu"}
ROTARY_BUFFERS = r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"  # saved by transformers up to 4.31

MAX_LAYERS, MAX_HEAD_DIM = 4096, 4096  # far beyond any model; every layer becomes nodes before tensors are compared

_PARTS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mixer_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}
_WHOLE = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}


def named(wanted: Wanted, layer: str, parts: Mapping[str, str], whole: Mapping[str, str]) -> str:
    """The tensor's name: `layer` names a layer, as "h.{}"; `parts` and `whole` what lies in one, and the rest."""
    part, _, kind = wanted.part.rpartition(".")
    if wanted.layer < 0:
        return f"{whole[part]}.{kind}"
    return f"{layer.format(wanted.layer)}.{parts[part]}.{kind}"


def source(wanted: Wanted, parts: Mapping[str, str] = _PARTS) -> str:
    """layers.0.attention.q.weight -> model.layers.0.self_attn.q_proj.weight, and so on."""
    return named(wanted, "model.layers.{}", parts, _WHOLE)


def renaming(names: Mapping[str, str]) -> Source:
    """`source`, but for some parts of a layer that the family calls something else."""
    return partial(source, parts=_PARTS | dict(names))


@dataclass(frozen=True, slots=True)
class Heads:
    """H, K, D."""

    heads: int
    kv_heads: int
    head_dim: int


def read_heads(reader: Reader, *, kv_heads: int | None = None, head_dim: int | None = None) -> Heads:
    """The attention's sizes; the arguments are the family's defaults, and where it has none H, and E / H."""
    heads, hidden = reader.size("num_attention_heads"), reader.size("hidden_size")
    kv = reader.optional_size("num_key_value_heads", kv_heads) or heads
    if heads % kv:
        raise reader.refused("num_key_value_heads", kv, f"a divisor of num_attention_heads = {heads}")
    size = reader.optional_size("head_dim", head_dim, MAX_HEAD_DIM)
    if size is None and hidden % heads:
        raise reader.refused("hidden_size", hidden, f"a multiple of num_attention_heads = {heads}, or a head_dim")
    size = size or hidden // heads
    if size > MAX_HEAD_DIM or size * heads > MAX_SIZE:
        raise reader.refused("num_attention_heads", heads, f"heads of at most {MAX_HEAD_DIM}, {MAX_SIZE} in all")
    if size % 2:
        raise reader.refused("head_dim", size, "an even number: rotary embedding turns pairs")
    return Heads(heads, kv, size)


def read_attention(
    reader: Reader, heads: Heads, limit: int, *,
    qkv_bias: bool = False, out_bias: bool = False, qk_norm: Norm | None = None, **rope: Any,
) -> Attention:  # fmt: skip
    """Attention over all that came before, scaled by 1/sqrt(D); `limit` is the config's number of positions.

    `rope`: what `read_rope` is told about the family.
    """
    turning, scale = read_rope(reader, heads.head_dim, limit, **rope), heads.head_dim**-0.5
    return Attention(heads.heads, heads.kv_heads, heads.head_dim, scale, turning, qkv_bias, out_bias, qk_norm)


def read_norm(reader: Reader, offset: float = 0.0, default: float = 1e-6) -> Norm:
    """`default`: the family's eps where the config says none."""
    return Norm(reader.number("rms_norm_eps", default), offset)


# Keys that transformers up to 4 wrote into every object of a config, with the defaults of its base class.
OBJECT_KEYS = (*chain.from_iterable(IGNORED.values()), *NEUTRAL)


def object_of(reader: Reader, key: str, default: Mapping[str, Any] | None = None) -> Reader:
    """The object under `key`, or one of the default's keys where there is none."""
    return reader.nested(key) or Reader(default or {}, key)


def read_layers(reader: Reader) -> int:
    return reader.size("num_hidden_layers", most=MAX_LAYERS)


def read_layer_types(reader: Reader, derived: Sequence[str], windows: bool = True) -> list[str]:
    """What each layer is, by `layer_types`, or where the config has none by `derived`, one after another, repeated.

    Without `windows` only full attention is known.
    """
    count, known = read_layers(reader), ("full_attention", "sliding_attention")[: 2 if windows else 1]
    types = reader.get("layer_types", None) or [derived[i % len(derived)] for i in range(count)]
    if not isinstance(types, list) or len(types) != count or any(t not in known for t in types):
        raise reader.refused("layer_types", types, f"a list of {count} of {', '.join(known)}")
    return types


def decoder(
    reader: Reader, mixers: Sequence[Attention], mlp: FeedForward, norm: AnyNorm, limit: int, *,
    tied: bool = False, **facts: Any,
) -> ModelSpec:  # fmt: skip
    """A decoder of these mixers, each layer and the end normalised alike; see `assemble`."""
    layers = [LayerSpec(mixer, mlp, norm, norm) for mixer in mixers]
    return assemble(reader, layers, norm, limit, tied=tied, **facts)


def assemble(
    reader: Reader, layers: Sequence[LayerSpec], norm: AnyNorm | None, limit: int, *, tied: bool = False, **facts: Any
) -> ModelSpec:
    """A decoder of these layers; `tied` is the family's default, `facts` further fields of the spec."""
    ropes = {layer.mixer.rope for layer in layers if isinstance(layer.mixer, AnyAttention) and layer.mixer.rope}
    return ModelSpec(
        layers=tuple(layers),
        vocab_size=reader.size("vocab_size"),
        hidden_size=reader.size("hidden_size"),
        final_norm=norm,
        max_position=max((reach(rope, limit) for rope in ropes), default=limit),
        tied_head=reader.flag("tie_word_embeddings", tied),
        **facts,
    )
