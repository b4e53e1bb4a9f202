"""Bindings: each canonical weight of a spec as an expression over the tensors of a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping

from penstock.ir import Graph, Type, Value, emit, leaf, tensor
from penstock.ir.rewrite import substitute
from penstock.spec import Attention, Mlp, ModelSpec

Binding = Mapping[str, Value]  # canonical name -> expression over `tensor` leaves


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every weight that `build_forward` reads, the head's own included where it is tied."""
    table = (spec.vocab_size, spec.hidden_size)
    out: dict[str, tuple[int, ...]] = {"embedding.weight": table}
    for i, layer in enumerate(spec.layers):
        out[f"layers.{i}.mixer_norm.weight"] = (spec.hidden_size,)
        out |= {f"layers.{i}.attention.{name}": s for name, s in _attention(layer.mixer, spec.hidden_size)}
        out[f"layers.{i}.feedforward_norm.weight"] = (spec.hidden_size,)
        out |= {f"layers.{i}.feedforward.{name}": s for name, s in _mlp(layer.feedforward, spec.hidden_size)}
    return out | {"final_norm.weight": (spec.hidden_size,), "head.weight": table}


def _attention(mixer: Attention, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    q, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    rows = {"q": q, "k": kv, "v": kv}
    for part, size in rows.items():
        yield f"{part}.weight", (size, hidden)
        if mixer.qkv_bias:
            yield f"{part}.bias", (size,)
    if mixer.qk_norm:
        yield "q_norm.weight", (mixer.head_dim,)
        yield "k_norm.weight", (mixer.head_dim,)
    yield "o.weight", (hidden, q)
    if mixer.out_bias:
        yield "o.bias", (hidden,)


def _mlp(mlp: Mlp, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    sizes = {"gate": (mlp.size, hidden), "up": (mlp.size, hidden), "down": (hidden, mlp.size)}
    for part, shape in sizes.items():
        yield f"{part}.weight", shape
        if mlp.bias:
            yield f"{part}.bias", shape[:1]


def bind(spec: ModelSpec, format: str, name: Callable[[str], str]) -> dict[str, Value]:
    """Every weight as the checkpoint tensor that `name` gives for it, in `format`; a tied head is the embedding."""
    binding = {c: leaf("tensor", name(c), tensor(format, *shape)) for c, shape in shapes(spec).items()}
    if spec.tied_head:
        binding["head.weight"] = binding["embedding.weight"]
    return binding


def declared(binding: Binding) -> dict[str, Type]:
    """Checkpoint name -> type of every tensor that the binding reads, each once."""
    return {node.name: node.types[0] for node in Graph(tuple(binding.values()), tuple(binding)).leaves("tensor")}


def random_binding(binding: Binding) -> dict[str, Value]:
    """The same weights from seeded random numbers in place of each checkpoint tensor: shapes without a checkpoint.

    Matrices keep the scale of what they multiply (standard deviation 1/sqrt of their columns), so that logits of any
    depth stay near one; norms are about one, biases about zero. The seed is a hash of the tensor's name.
    """
    graph = Graph(tuple(binding.values()), tuple(binding))
    swaps = {node[0]: _random(node.name, node.types[0]) for node in graph.leaves("tensor")}
    return dict(zip(graph.names, substitute(graph, swaps).outputs, strict=True))


def _random(name: str, type: Type) -> Value:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 2
    std = 0.02 if len(type.shape) == 1 else int(type.shape[-1]) ** -0.5
    mean = 1.0 if name.endswith("norm.weight") else 0.0
    return emit("random", shape=type.shape, format=type.format.name, seed=seed, std=std, mean=mean)[0]
