"""Two tiny layers of each family: what golden graphs are printed of and passes are tested on. No torch."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from penstock.ir import Graph
from penstock.models.binding import bind
from penstock.models.decoder import build_forward
from penstock.models.encoder import build_encoder
from penstock.spec import Attention, LayerSpec, Llama3, Mlp, ModelSpec, Norm, Rope
from tests.golden import families

BLOCK = 4


def decoder(mixer: Attention, mlp: Mlp, norm: Norm, **rest: object) -> ModelSpec:
    """Two equal layers, E = 32, V = 48."""
    defaults = {"vocab_size": 48, "hidden_size": 32, "final_norm": norm, "max_position": 64}
    return ModelSpec((LayerSpec(mixer, mlp, norm, norm),) * 2, **(defaults | rest))  # type: ignore[arg-type]


def mixer(**changes: object) -> Attention:
    """H = 4, K = 2, D = 8."""
    return replace(Attention(4, 2, 8, 8**-0.5, Rope(10000.0, 8)), **changes)  # type: ignore[arg-type]


NORM = Norm(1e-5)
SILU = Mlp(64, "silu")

FAMILIES: dict[str, ModelSpec] = {
    "llama": decoder(mixer(rope=Rope(500000.0, 8, Llama3(8.0, 1.0, 4.0, 32))), SILU, NORM),
    "mistral": decoder(mixer(window=6), SILU, NORM),
    "qwen2": decoder(mixer(qkv_bias=True), SILU, Norm(1e-6), tied_head=True),
    "qwen3": decoder(mixer(head_dim=16, rope=Rope(1e6, 16), qk_norm=Norm(1e-6)), SILU, Norm(1e-6)),
    "gemma": decoder(
        mixer(kv_heads=1), Mlp(64, "gelu_tanh"), Norm(1e-6, offset=1.0), tied_head=True, embedding_scale=32**0.5
    ),
}

GOLDEN = dict(FAMILIES)  # and those of every other family, which the tests of passes need not know
for _module in pkgutil.iter_modules(families.__path__):
    GOLDEN |= importlib.import_module(f"{families.__name__}.{_module.name}").FAMILIES

ODD: dict[str, ModelSpec] = {
    "odd F": decoder(mixer(), Mlp(21, "silu"), NORM),
    "odd F, biases": decoder(mixer(qkv_bias=True, out_bias=True), Mlp(21, "silu", bias=True), NORM),
    "F of 4 more than 8, biases": decoder(mixer(), Mlp(20, "relu", bias=True), NORM),
    "odd V, tied": decoder(mixer(), SILU, NORM, vocab_size=43, tied_head=True),
    "odd E and V": decoder(mixer(), SILU, NORM, vocab_size=43, hidden_size=30),
    "odd qkv": decoder(mixer(heads=3, kv_heads=1, head_dim=6, rope=Rope(10000.0, 4)), SILU, NORM),
}


def forward(spec: ModelSpec, format: str = "bf16") -> Graph:
    """The graph as a builder makes it, over tensors that bear the canonical names behind "model."."""
    return build_forward(spec, bind(spec, format, lambda wanted: f"model.{wanted.name}"), format, BLOCK)


def encoder(spec: ModelSpec, format: str = "bf16") -> Graph:
    """The same of its encoder."""
    graph = build_encoder(spec, bind(spec, format, lambda wanted: f"model.{wanted.name}"), format, BLOCK)
    assert graph is not None
    return graph


# By the name of its golden file, every program of every family.
PROGRAMS: dict[str, Callable[[], Graph]] = {
    **{name: partial(forward, spec) for name, spec in GOLDEN.items()},
    **{f"{name}.encode": partial(encoder, spec) for name, spec in GOLDEN.items() if spec.encoder},
}
