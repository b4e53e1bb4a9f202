"""Who holds what: the names of the tensors, and how each is dealt over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock.models.binding import shapes
from penstock.spec import ModelSpec

TABLE, FINAL_NORM, HEAD = "transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"

# Ours -> (theirs, the dimension of the weight that is dealt over tp ranks; None: every rank has all of it). Weights are
# [out, in] on both sides. `fc` is the half that is activated and `gate` the other: their names are crossed.
MODULES: dict[str, tuple[str, int | None]] = {
    "attention.o": ("attention.dense", 1),
    "feedforward.gate": ("mlp.fc", 0),
    "feedforward.up": ("mlp.gate", 0),
    "feedforward.down": ("mlp.proj", 1),
    "mixer_norm": ("input_layernorm", None),
    "feedforward_norm": ("post_layernorm", None),
    "attention.q_norm": ("attention.q_layernorm", None),
    "attention.k_norm": ("attention.k_layernorm", None),
}
QKV = ("attention.q", "attention.k", "attention.v")  # one tensor of theirs: a rank's q rows, then its k, then its v


@dataclass(frozen=True, slots=True)
class Ranks:
    """tp ranks for each of pp stages: rank = stage * tp + its place among the tp.

    `split_table`: the embedding is dealt over the tp ranks too, along `table_dim`; otherwise each has all of it.
    """

    tp: int = 1
    pp: int = 1
    split_table: bool = False
    table_dim: int = 0

    @property
    def count(self) -> int:
        return self.tp * self.pp

    def stages(self, layers: int) -> tuple[range, ...]:
        """The layers of each stage; the first ones have one more where they do not divide."""
        size, extra = divmod(layers, self.pp)
        starts = [stage * size + min(stage, extra) for stage in range(self.pp + 1)]
        return tuple(map(range, starts[:-1], starts[1:]))

    def padded(self, rows: int) -> int:
        """A vocabulary's rows with the zero rows that make it divide."""
        return -(-rows // self.tp) * self.tp

    def head_of(self, rank: int, kv_heads: int) -> int:
        """The KV head of a rank where there are fewer than ranks: neighbours repeat one."""
        return rank * kv_heads // self.tp


def tensor_name(module: str, kind: str) -> tuple[str, int | None]:
    """(their name within the layer, dealt dimension). The bias of a linear dealt by columns is whole on every rank."""
    theirs, dim = MODULES[module]
    return f"{theirs}.{kind}", None if kind == "bias" and dim == 1 else dim


def layer_parts(spec: ModelSpec) -> dict[int, tuple[str, ...]]:
    """Layer -> our names of its weights, less the prefix: attention.q.weight, ..."""
    found: dict[int, list[str]] = {}
    for name in shapes(spec):
        if name.startswith("layers."):
            _, layer, part = name.split(".", 2)
            found.setdefault(int(layer), []).append(part)
    return {layer: tuple(parts) for layer, parts in found.items()}


def modules(parts: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(module, kind) of each part: ("attention.q", "weight")."""
    for part in parts:
        module, _, kind = part.rpartition(".")
        yield module, kind
