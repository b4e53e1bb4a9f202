"""What the lists of tensors are written with: a config's sizes in, (name, shape) out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

Config = dict[str, Any]
Tensors = Iterator[tuple[str, tuple[int, ...]]]
Weights = Callable[[Config], Tensors]


def linear(name: str, rows: int, columns: int, bias: bool = False) -> Tensors:
    """[out, in], as torch stores it."""
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def norm(name: str, *size: int, bias: bool = False) -> Tensors:
    yield f"{name}.weight", size
    if bias:
        yield f"{name}.bias", size


def swiglu(name: str, inner: int, hidden: int, bias: bool = False) -> Tensors:
    for part in ("gate", "up"):
        yield from linear(f"{name}.{part}_proj", inner, hidden, bias)
    yield from linear(f"{name}.down_proj", hidden, inner, bias)


def attention(name: str, c: Config, bias: bool = False, out_bias: bool = False) -> Tensors:
    """q, k, v and o apart, with grouped heads and a head size of their own where the config states one."""
    hidden, size, kv = c["hidden_size"], head_size(c), kv_heads(c) * head_size(c)
    for part, rows in (("q", c["num_attention_heads"] * size), ("k", kv), ("v", kv)):
        yield from linear(f"{name}.{part}_proj", rows, hidden, bias)
    yield from linear(f"{name}.o_proj", hidden, c["num_attention_heads"] * size, out_bias)


def head_size(c: Config) -> int:
    return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


def kv_heads(c: Config) -> int:
    return int(c.get("num_key_value_heads") or c["num_attention_heads"])


def prefixed(prefix: str, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> Tensors:
    for name, shape in tensors:
        yield f"{prefix}{name}", shape


def stack(prefix: str, count: int, layer: Callable[[int], Tensors]) -> Tensors:
    for i in range(count):
        yield from prefixed(f"{prefix}.{i}.", layer(i))


def llama_like(c: Config, layer: Callable[[int], Tensors], layers: int) -> Tensors:
    """Table, layers, last norm, and a head where it is not tied, under the names that most families share."""
    yield "model.embed_tokens.weight", (c["vocab_size"], c["hidden_size"])
    yield from stack("model.layers", layers, layer)
    yield from norm("model.norm", c["hidden_size"])
    if not c.get("tie_word_embeddings", False):
        yield "lm_head.weight", (c["vocab_size"], c["hidden_size"])
