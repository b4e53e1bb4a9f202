"""Tensor names and shapes of published checkpoints, generated from each repository's pattern.

Every list holds what the published weight files hold, oddities included: rotary buffers that old files carry, an
`lm_head.weight` beside tied embeddings, and its absence where it is tied. SOURCES.md says which facts are sourced.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tests.facts import catalog

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Layout:
    """The sizes of one checkpoint (DESIGN.md's letters: E, H, K, D, F, V) and what its files hold besides weights."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocab: int
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    has_lm_head: bool = True
    rotary_buffers: bool = False


_LLAMA_7B = Layout(32, 4096, 32, 32, 128, 11008, 32000)
_LLAMA_7B_BUFFERS = Layout(32, 4096, 32, 32, 128, 11008, 32000, rotary_buffers=True)
_LLAMA3_8B = Layout(32, 4096, 32, 8, 128, 14336, 128256)
_QWEN2_7B = Layout(28, 3584, 28, 4, 128, 18944, 152064, qkv_bias=True)
_GEMMA_2B = Layout(18, 2048, 8, 1, 256, 16384, 256000, tied=True, has_lm_head=False)

LAYOUTS: dict[str, Layout] = {
    "decapoda-llama-7b": _LLAMA_7B_BUFFERS,
    "huggyllama-llama-7b": _LLAMA_7B_BUFFERS,
    "Llama-2-7b-hf": _LLAMA_7B_BUFFERS,
    "Llama-2-70b-hf": Layout(80, 8192, 64, 8, 128, 28672, 32000, rotary_buffers=True),
    "chinese-alpaca-2-13b-16k": Layout(40, 5120, 40, 40, 128, 13824, 55296, rotary_buffers=True),
    "vicuna-7b-v1.5-16k": _LLAMA_7B_BUFFERS,
    "med42-70b-dynamic": Layout(80, 8192, 64, 8, 128, 28672, 32000),
    "Yarn-Llama-2-7b-128k": _LLAMA_7B,
    "Meta-Llama-3-8B": _LLAMA3_8B,
    "Llama-3.1-8B": _LLAMA3_8B,
    "Llama-3.2-1B": Layout(16, 2048, 32, 8, 64, 8192, 128256, tied=True, has_lm_head=False),
    "Mistral-7B-v0.1": Layout(32, 4096, 32, 8, 128, 14336, 32000),
    "Mistral-7B-Instruct-v0.3": Layout(32, 4096, 32, 8, 128, 14336, 32768),
    "Qwen2-7B": _QWEN2_7B,
    "Qwen2.5-0.5B": Layout(24, 896, 14, 2, 64, 4864, 151936, qkv_bias=True, tied=True, has_lm_head=False),
    "Qwen2.5-7B-Instruct": _QWEN2_7B,
    # Tied, yet the file repeats the embedding as lm_head.weight.
    "Qwen3-0.6B": Layout(28, 1024, 16, 8, 128, 3072, 151936, qk_norm=True, tied=True),
    "Qwen1.5-0.5B": Layout(24, 1024, 16, 16, 64, 2816, 151936, qkv_bias=True, tied=True),
    "Qwen1.5-32B": Layout(64, 5120, 40, 8, 128, 27392, 152064, qkv_bias=True),
    "Qwen2.5-3B": Layout(36, 2048, 16, 2, 128, 11008, 151936, qkv_bias=True, tied=True, has_lm_head=False),
    "Qwen2.5-72B": Layout(80, 8192, 64, 8, 128, 29568, 152064, qkv_bias=True),
    "Qwen3-1.7B": Layout(28, 2048, 16, 8, 128, 6144, 151936, qk_norm=True, tied=True),
    "Qwen3-32B": Layout(64, 5120, 64, 8, 128, 25600, 151936, qk_norm=True),
    "Qwen3-8B": Layout(36, 4096, 32, 8, 128, 12288, 151936, qk_norm=True),
    "gemma-2b": _GEMMA_2B,
    "gemma-7b": Layout(28, 3072, 16, 16, 256, 24576, 256000, tied=True, has_lm_head=False),
    "codegemma-2b": _GEMMA_2B,
}

# Parameters as the model cards count them: tied weights once, buffers not at all.
PARAMETERS: dict[str, int] = {
    "decapoda-llama-7b": 6_738_415_616,
    "huggyllama-llama-7b": 6_738_415_616,
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-2-70b-hf": 68_976_648_192,
    "chinese-alpaca-2-13b-16k": 13_254_415_360,
    "vicuna-7b-v1.5-16k": 6_738_415_616,
    "med42-70b-dynamic": 68_976_648_192,
    "Yarn-Llama-2-7b-128k": 6_738_415_616,
    "Meta-Llama-3-8B": 8_030_261_248,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen2-7B": 7_615_616_512,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "codegemma-2b": 2_506_172_416,
    "Qwen1.5-0.5B": 463_987_712,
    "Qwen1.5-32B": 32_512_218_112,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-32B": 32_762_123_264,
    **{name: fact.parameters for name, fact in catalog.CATALOG.items()},
}

# `metadata.total_size` of the published index, bytes: it counts buffers, so it settles which files have them.
# All three are of 2-byte weights; the buffers of Llama-2-7b are 2 bytes a number, those of Llama-2-70b 4.
INDEX_BYTES: dict[str, int] = {
    "Llama-2-7b-hf": 13_476_835_328,
    "Llama-2-70b-hf": 137_953_316_864,
    "Mistral-7B-v0.1": 14_483_464_192,
}


def published_config(name: str) -> dict[str, Any]:
    """The `config.json` of checkpoint `name`, as published. Raises FileNotFoundError for an unknown name."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


def tensor_names(name: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the weight files of checkpoint `name`. Raises KeyError for an unknown name."""
    if name in LAYOUTS:
        return dict(_tensors(LAYOUTS[name]))
    extra, config = catalog.CATALOG[name].extra, published_config(name)
    return dict(catalog.weights(config)) | dict(extra(config))


def parameters(name: str) -> int:
    """Parameters of checkpoint `name` computed from its shapes: no buffers, tied weights once."""
    if name not in LAYOUTS:
        return catalog.counted(published_config(name))
    tied = LAYOUTS[name].tied
    shapes = tensor_names(name).items()
    return sum(prod(s) for n, s in shapes if not is_buffer(n) and not (tied and n == "lm_head.weight"))


def is_buffer(tensor: str) -> bool:
    """Whether a published tensor is a constant that a loader must ignore, not a weight."""
    return tensor.endswith("rotary_emb.inv_freq")


def _tensors(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    table = (layout.vocab, layout.hidden)
    yield "model.embed_tokens.weight", table
    for i in range(layout.layers):
        for name, shape in _layer(layout):
            yield f"model.layers.{i}.{name}", shape
    yield "model.norm.weight", (layout.hidden,)
    if layout.has_lm_head:
        yield "lm_head.weight", table


def _layer(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _attention(layout)
    yield "mlp.gate_proj.weight", (layout.inner, layout.hidden)
    yield "mlp.up_proj.weight", (layout.inner, layout.hidden)
    yield "mlp.down_proj.weight", (layout.hidden, layout.inner)
    yield "input_layernorm.weight", (layout.hidden,)
    yield "post_attention_layernorm.weight", (layout.hidden,)


def _attention(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    q, kv = layout.heads * layout.head_size, layout.kv_heads * layout.head_size
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        yield f"self_attn.{name}_proj.weight", (rows, layout.hidden)
        if layout.qkv_bias:
            yield f"self_attn.{name}_proj.bias", (rows,)
    yield "self_attn.o_proj.weight", (layout.hidden, q)
    if layout.qk_norm:
        yield "self_attn.q_norm.weight", (layout.head_size,)
        yield "self_attn.k_norm.weight", (layout.head_size,)
    if layout.rotary_buffers:
        yield "self_attn.rotary_emb.inv_freq", (layout.head_size // 2,)
