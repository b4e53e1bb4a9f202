"""What a builder works with: the step's inputs as graph values, and the weights of one module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from penstock.engine.groups import BY_SLOT
from penstock.ir import Value, emit, leaf, tensor
from penstock.ir.ops.state import table_name
from penstock.models.binding import Binding
from penstock.spec import AnyNorm, ModelSpec, Norm, Rope, inverse_frequencies


@dataclass(frozen=True, slots=True)
class Inputs:
    """The ragged batch of one step: T tokens of S sequences, L of them asked for logits."""

    tokens: Value  # i32[T]
    positions: Value  # i32[T], in its own sequence
    rows: Value  # i32[T], the sequence of each token; -1 is padding
    query_start: Value  # i32[S], of each sequence's tokens in T
    query_len: Value  # i32[S]
    context_len: Value  # i32[S], the step's own tokens included
    block_table: Value  # i32[S,M], of one group of layers
    slot_of_row: Value  # i32[S], where states are kept by slot; -1 is padding
    logit_rows: Value  # i32[L], indices into T
    freqs: Value | None  # f32[S,d/2] where the rope is fixed by request
    encoder_len: Value | None  # i32[S], of each sequence's input, where an encoder has read it; or of its prefix

    @classmethod
    def of(cls, spec: ModelSpec) -> Inputs:
        """Fresh leaves, with `freqs` only where the spec needs them."""
        rope = spec.request_rope
        return cls(
            **{name: _input(name, "T") for name in ("tokens", "positions", "rows")},
            **{name: _input(name, "S") for name in ("query_start", "query_len", "context_len", "slot_of_row")},
            block_table=_input("block_table", "S", "M"),
            logit_rows=_input("logit_rows", "L"),
            freqs=leaf("input", "freqs", tensor("f32", "S", rope.dim // 2)) if rope else None,
            encoder_len=_input("encoder_len", "S") if spec.encoder or spec.prefix else None,
        )

    def by_group(self, states: Iterable[Value]) -> dict[str, Inputs]:
        """The same for each group of states, with its own block table where it keeps blocks."""
        names = list(dict.fromkeys(map(group_of, states)))
        paged = [name for name in names if not name.startswith(BY_SLOT)]
        tables = [self.block_table, *(_input(table_name(i), "S", "M") for i in range(1, len(paged)))]
        own = {name: replace(self, block_table=table) for name, table in zip(paged, tables, strict=False)}
        return {name: own.get(name, self) for name in names}


def group_of(state: Value) -> str:
    """The group that a state's leaf names."""
    return str(state.node.attr("group"))


def _input(name: str, *shape: str) -> Value:
    return leaf("input", name, tensor("i32", *shape))


class Frequencies:
    """Rope frequencies as values: the request's own, or one constant for all layers that share a rope."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._constants: dict[Rope, Value] = {}

    def __getitem__(self, rope: Rope) -> Value:
        if rope.by_request:
            assert self._inputs.freqs is not None
            return self._inputs.freqs
        if rope not in self._constants:
            values = inverse_frequencies(rope)
            self._constants[rope] = emit("literal", shape=(1, len(values)), values=values)[0]
        return self._constants[rope]


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights below one prefix of the canonical names; of the whole model below none."""

    binding: Binding
    prefix: str = ""

    def __getitem__(self, name: str) -> Value:
        return self.binding[f"{self.prefix}.{name}" if self.prefix else name]

    def of_stack(self, name: str) -> Value:
        """A weight that all layers of a stack share: the encoder's, or the decoder's."""
        return self.binding[self.prefix.partition("layers.")[0] + name]

    def linear(self, x: Value, name: str, bias: bool = False, out: str | None = None) -> Value:
        """x times the matrix `name`, plus its bias where the model has one."""
        extra = (self[f"{name}.bias"],) if bias else ()
        return emit("linear", x, self[f"{name}.weight"], *extra, out=out)[0]

    def norm(self, x: Value, name: str, spec: AnyNorm | None) -> Value:
        """x normalised by the weights `name`; x itself where the model has no such norm."""
        match spec:
            case None:
                return x
            case Norm(eps, offset):
                return emit("rms_norm", x, self[f"{name}.weight"], eps=eps, offset=offset)[0]
        bias = (self[f"{name}.bias"],) if spec.bias else ()
        return emit("layer_norm", x, self[f"{name}.weight"], *bias, eps=spec.eps)[0]

    def below(self, part: str) -> Weights:
        """The weights of a part of this module."""
        return Weights(self.binding, f"{self.prefix}.{part}" if self.prefix else part)
