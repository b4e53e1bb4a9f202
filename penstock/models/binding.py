"""Bindings: each canonical weight of a spec as an expression over the tensors of a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from penstock.errors import ModelError
from penstock.ir import Graph, Type, Value, emit, leaf, tensor
from penstock.ir.rewrite import substitute
from penstock.spec import (
    AnyNorm,
    Attention,
    BySlot,
    DeltaNet,
    EncoderSpec,
    FeedForward,
    Latent,
    LayerNorm,
    LayerSpec,
    Mixer,
    Mlp,
    ModelSpec,
    Moe,
    Norm,
    RelativeBias,
    StateSpace,
)

Binding = Mapping[str, Value]  # canonical name -> expression over `tensor` leaves
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every weight that `build_forward` reads, a head's own included where it is tied."""
    hidden, width = spec.hidden_size, spec.embedding_size or spec.hidden_size
    out: dict[str, tuple[int, ...]] = {"embedding.weight": (spec.vocab_size, width)}
    if spec.embedding_size:
        out |= {"project_in.weight": (hidden, width), "project_out.weight": (width, hidden)}
    if spec.encoder:
        out |= dict(_below("encoder", _stack(spec.encoder, hidden)))
    out |= dict(_stack(spec, hidden))
    return out | dict(_linear("head", spec.vocab_size, width, spec.head_bias) if spec.head else ())


def _stack(stack: ModelSpec | EncoderSpec, hidden: int) -> Shapes:
    """Of all layers, and what stands around them. A relative bias is a table of all layers, [buckets, heads]."""
    if stack.learned_positions:
        yield "positions.weight", (stack.learned_positions, hidden)
    yield from _norm("embedding_norm", stack.embedding_norm, hidden)
    attentions = [layer.mixer for layer in stack.layers if isinstance(layer.mixer, Attention)]
    biases = {(m.bias.buckets, m.heads) for m in attentions if isinstance(m.bias, RelativeBias)}
    assert len(biases) <= 1, "the layers of a stack share one relative bias"
    yield from (("relative_bias.weight", shape) for shape in biases)
    for i, layer in enumerate(stack.layers):
        yield from _below(f"layers.{i}", _layer(layer, hidden))
    yield from _norm("final_norm", stack.final_norm, hidden)


def _layer(layer: LayerSpec, hidden: int) -> Shapes:
    for name in ("mixer_norm", "mixer_post_norm", "cross_norm", "feedforward_norm", "feedforward_post_norm"):
        yield from _norm(name, getattr(layer, name), hidden)
    yield from _below(mixer_name(layer.mixer), _mixer(layer.mixer, hidden))
    if layer.cross:
        yield from _below("cross", _attention(layer.cross, hidden))
    if layer.feedforward:
        yield from _below("feedforward", _feedforward(layer.feedforward, hidden))


def _below(prefix: str, shapes: Shapes) -> Shapes:
    return ((f"{prefix}.{name}", shape) for name, shape in shapes)


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(name: str, norm: AnyNorm | None, *shape: int) -> Shapes:
    if norm:
        yield f"{name}.weight", shape
    if isinstance(norm, LayerNorm) and norm.bias:
        yield f"{name}.bias", shape


def mixer_name(mixer: Mixer) -> str:
    """What the names of its weights begin with, behind the layer's."""
    return "mixer" if isinstance(mixer, BySlot) else "attention"


def _mixer(mixer: Mixer, hidden: int) -> Shapes:
    match mixer:
        case Attention():
            return _attention(mixer, hidden)
        case Latent():
            return _latent(mixer, hidden)
        case StateSpace():
            return _state_space(mixer, hidden)
    return _delta_net(mixer, hidden)


def _delta_net(mixer: DeltaNet, hidden: int) -> Shapes:
    """Rows of `in`: the convolution's channels, the gate, how much each head replaces, and the step of each."""
    yield from _linear("in", mixer.channels + mixer.size + 2 * mixer.heads, hidden)
    yield from _linear("conv", mixer.channels, mixer.kernel)
    yield from ((name, (mixer.heads,)) for name in ("decay", "step_bias"))
    yield from _norm("norm", Norm(mixer.eps), mixer.head_dim)
    yield from _linear("out", hidden, mixer.size)


def _state_space(mixer: StateSpace, hidden: int) -> Shapes:
    """Rows of `in`: the gate, the convolution's channels, and the step of each head."""
    yield from _linear("in", mixer.size + mixer.channels + mixer.heads, hidden, mixer.bias)
    yield from _linear("conv", mixer.channels, mixer.kernel, mixer.kernel_bias)
    yield from ((name, (mixer.heads,)) for name in ("decay", "step_bias", "skip"))
    yield from _norm("norm", Norm(mixer.eps), mixer.size)
    yield from _linear("out", hidden, mixer.size, mixer.bias)


def _latent(mixer: Latent, hidden: int) -> Shapes:
    """Of each head's query the rotated numbers come first; `keys` and `values` are the halves of what expands latents,
    the former transposed, as it multiplies queries."""
    norm = Norm(mixer.eps)
    if mixer.query_rank:
        yield from _linear("q_down", mixer.query_rank, hidden, mixer.bias)
        yield from _norm("q_norm", norm, mixer.query_rank)
    yield from _linear("q", mixer.heads * (mixer.rope.dim + mixer.plain), mixer.query_rank or hidden)
    yield from _linear("kv_down", mixer.rank + mixer.rope.dim, hidden, mixer.bias)
    yield from _norm("kv_norm", norm, mixer.rank)
    yield "keys.weight", (mixer.heads, mixer.rank, mixer.plain)
    yield "values.weight", (mixer.heads, mixer.value, mixer.rank)
    yield from _linear("o", hidden, mixer.heads * mixer.value, mixer.bias)


def _attention(mixer: Attention, hidden: int) -> Shapes:
    size = mixer.head_dim
    heads = {"q": mixer.heads, "k": mixer.kv_heads, "v": mixer.kv_heads}
    for part, count in heads.items():
        yield from _linear(part, count * size, hidden, mixer.qkv_bias)
    for part in "qk":
        over = {"head": (size,), "heads": (heads[part], size), "row": (heads[part] * size,)}
        yield from _norm(f"{part}_norm", mixer.qk_norm, *over[mixer.qk_norm_over])
    if mixer.sinks:
        yield "sinks", (mixer.heads,)
    if mixer.gated:
        yield from _linear("gate", mixer.heads * size, hidden, mixer.qkv_bias)
    yield from _linear("o", hidden, mixer.heads * size, mixer.out_bias)


def _feedforward(part: FeedForward, hidden: int) -> Shapes:
    return _mlp(part, hidden) if isinstance(part, Mlp) else _moe(part, hidden)


def _mlp(mlp: Mlp, hidden: int) -> Shapes:
    if mlp.gated:
        yield from _linear("gate", mlp.size, hidden, mlp.bias)
    yield from _linear("up", mlp.size, hidden, mlp.bias)
    yield from _linear("down", hidden, mlp.size, mlp.bias)


def _moe(moe: Moe, hidden: int) -> Shapes:
    """The experts' matrices lie in one array each: gate and up of one expert after another, and its way down."""
    count, size = moe.router.experts, moe.expert.size
    yield from _linear("router", count, hidden, moe.router.bias)
    if moe.router.correction:
        yield "correction", (count,)
    yield "experts.in.weight", (count, 2 * size, hidden)
    yield "experts.out.weight", (count, hidden, size)
    if moe.expert.bias:
        yield "experts.in.bias", (count, 2 * size)
        yield "experts.out.bias", (count, hidden)
    if moe.shared:
        yield from _below("shared", _mlp(moe.shared, hidden))
    if moe.shared_gate:
        yield "shared_gate.weight", (1, hidden)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One canonical weight, as a family is asked where it comes from."""

    spec: ModelSpec
    name: str  # layers.0.attention.q.weight
    shape: tuple[int, ...]
    format: str

    @property
    def layer(self) -> int:
        """The index of its layer, in its stack; -1 where it is of none."""
        return int(self._own.split(".", 2)[1]) if self._own.startswith("layers.") else -1

    @property
    def part(self) -> str:
        """The name within its layer, or that of the whole: attention.q.weight, embedding.weight."""
        return self._own.split(".", 2)[2] if self.layer >= 0 else self._own

    @property
    def of_encoder(self) -> bool:
        return self.name.startswith("encoder.")

    @property
    def _own(self) -> str:
        return self.name.removeprefix("encoder.")

    @property
    def attention(self) -> Attention:
        """Its layer's mixer, where that attends by queries, keys and values."""
        mixer = self.spec.layers[self.layer].mixer
        assert isinstance(mixer, Attention), mixer
        return mixer

    def tensor(self, name: str, *shape: int) -> Value:
        """The checkpoint's tensor of that name; without a shape it has the weight's own."""
        return leaf("tensor", name, tensor(self.format, *(shape or self.shape)))


Source = Callable[[Wanted], Value | str]
# Read in float32, whatever the model's format: what enters sums that are float32.
EXACT = ("correction", "decay", "sinks", "skip", "step_bias")


def bind(spec: ModelSpec, format: str, source: Source) -> dict[str, Value]:
    """Every weight as what `source` gives for it: the name of the checkpoint's tensor, or an expression over tensors.

    A tied head is the embedding. Raises ModelError for an expression of another shape than the weight's.
    """
    wanted = shapes(spec)
    binding = {name: _sourced(Wanted(spec, name, shape, format), source) for name, shape in wanted.items()}
    if spec.tied_head and spec.head:
        binding["head.weight"] = binding["embedding.weight"]
    return binding


def sourced(spec: ModelSpec, name: str, format: str, source: Source) -> Value:
    """One of them."""
    return _sourced(Wanted(spec, name, shapes(spec)[name], format), source)


def _sourced(wanted: Wanted, source: Source) -> Value:
    if wanted.name.rpartition(".")[2] in EXACT:
        wanted = replace(wanted, format="f32")
    found = source(wanted)
    value = wanted.tensor(found) if isinstance(found, str) else found
    if value.type.shape != wanted.shape:
        raise ModelError(f"{wanted.name} has shape {wanted.shape}, its expression gives {value.type.shape}; mend it")
    return value


def declared(binding: Binding) -> dict[str, Type]:
    """Checkpoint name -> type of every tensor that the binding reads, each once."""
    return {node.name: node.types[0] for node in Graph(tuple(binding.values()), tuple(binding)).leaves("tensor")}


def random_binding(binding: Binding) -> dict[str, Value]:
    """The same weights from seeded random numbers in place of each checkpoint tensor: shapes without a checkpoint.

    Matrices keep the scale of what they multiply (standard deviation 1/sqrt of their columns), so that logits of any
    depth stay near one; norms are about one, biases about zero. The seed is a hash of the tensor's name.
    """
    graph = Graph(tuple(binding.values()), tuple(binding))
    floats = [node for node in graph.leaves("tensor") if node.types[0].format.is_float]
    swaps = {node[0]: _random(node.name, node.types[0]) for node in floats}
    packed = (node for node in graph.nodes if node.op == "mxfp4")  # whose bytes at random would be no weights
    swaps |= {node[0]: _random(node.inputs[0].node.name, node.types[0]) for node in packed}
    return dict(zip(graph.names, substitute(graph, swaps).outputs, strict=True))


def _random(name: str, type: Type) -> Value:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 2
    std = 0.02 if len(type.shape) == 1 else int(type.shape[-1]) ** -0.5
    mean = 1.0 if len(type.shape) == 1 and not name.endswith("bias") else 0.0
    return emit("random", shape=type.shape, format=type.format.name, seed=seed, std=std, mean=mean)[0]
