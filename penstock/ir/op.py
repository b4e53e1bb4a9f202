"""What an operation is: a type rule and a reference. `@op` makes the decorated function the op's meaning.

A fused op is declared by its parts: `@fused` takes a function that emits the ops it stands for, and from it derives the
type rule, the reference, and the `parts` tactic that every fused op has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from penstock import plugins
from penstock.errors import GraphError
from penstock.ir.graph import LEAVES, Graph, Node, Type, Value, freeze, leaf

Infer = Callable[..., Type | tuple[Type, ...]]
Example = Callable[..., Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Op:
    """One word of the vocabulary.

    `writes` names the inputs that the op replaces in place (state): such a node is never merged or dropped, and the
    result at the same index as in `writes` order shares its input's memory.
    `weight` ops compute weights from checkpoint tensors; build runs them, a step never does.
    """

    name: str
    infer: Infer
    reference: Callable[..., Any]
    parts: Callable[..., tuple[Value, ...]] | None = None
    writes: Mapping[int, int] | None = None  # input index -> output index that aliases it
    weight: bool = False
    sized: bool = False  # the reference takes `sizes`: its results are padded to the bucket
    example: Example | None = None  # (types, attrs, sizes, generator, device) -> realistic inputs, for timing

    def types(self, inputs: Sequence[Type], attrs: Mapping[str, Any]) -> tuple[Type, ...]:
        """The result types. Raises GraphError with the op and its operand types."""
        try:
            out = self.infer(*inputs, **attrs)
        except Exception as error:
            if not isinstance(error, ValueError | TypeError | AssertionError) and not plugins.owner("op", self.name):
                raise
            operands = ", ".join(map(str, inputs))
            raise GraphError(f"{self.name}({operands}) {dict(attrs)}: {error}") from None
        return out if isinstance(out, tuple) else (out,)


_OPS: dict[str, Op] = {}


def get(name: str) -> Op:
    """The op of that name. Raises GraphError for an unknown one."""
    if name not in _OPS:
        import penstock.ir.ops  # noqa: F401  (registers the vocabulary on first use)
    if name not in _OPS:
        raise GraphError(f"unknown op {name!r}; known are {', '.join(sorted(_OPS))}")
    return _OPS[name]


def vocabulary() -> tuple[Op, ...]:
    """Every registered op, by name."""
    get("add")
    return tuple(_OPS[name] for name in sorted(_OPS))


def op(
    infer: Infer,
    *,
    writes: Mapping[int, int] | None = None,
    weight: bool = False,
    sized: bool = False,
    example: Example | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the reference of the op that bears its name."""

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        name = reference.__name__.rstrip("_")
        _add(Op(name, infer, reference, None, writes, weight, sized, example), reference.__module__)
        return reference

    return register


def fused(
    *, writes: Mapping[int, int] | None = None, example: Example | None = None
) -> Callable[[Callable[..., tuple[Value, ...]]], Callable[..., tuple[Value, ...]]]:
    """Register an op by the ops it replaces: the decorated function emits them on Values and returns the results."""

    def register(parts: Callable[..., tuple[Value, ...]]) -> Callable[..., tuple[Value, ...]]:
        name = parts.__name__

        def infer(*types: Type, **attrs: Any) -> tuple[Type, ...]:
            return tuple(v.type for v in parts_graph(name, types, tuple(sorted(attrs.items()))).outputs)

        def reference(*tensors: Any, **attrs: Any) -> tuple[Any, ...]:
            from penstock.ir.interpret import run_parts

            return run_parts(name, tensors, attrs)

        _add(Op(name, infer, reference, parts, writes, False, False, example), parts.__module__)
        return parts

    return register


@lru_cache(maxsize=4096)
def parts_graph(name: str, types: tuple[Type, ...], attrs: tuple[tuple[str, Any], ...]) -> Graph:
    """What a fused op stands for, as a graph over inputs "0", "1", ... and results "0", "1", ..."""
    parts = get(name).parts
    assert parts is not None, name
    outputs = parts(*(leaf("input", str(i), t) for i, t in enumerate(types)), **dict(attrs))
    return Graph(outputs, tuple(str(i) for i in range(len(outputs))))


def emit(name: str, *inputs: Value, **attrs: Any) -> Node:
    """A typed node. Raises GraphError where the op refuses its operands."""
    frozen = {k: freeze(v) for k, v in attrs.items() if v is not None}
    types = get(name).types([v.type for v in inputs], frozen)
    return Node(name, inputs, tuple(sorted(frozen.items())), types)


def _add(new: Op, home: str) -> None:
    """Raises PluginError for a name that is taken. Ours come first, whoever defines one."""
    if not home.startswith("penstock."):
        get("add")
    plugins.note("op", new.name, new.name in _OPS or new.name in LEAVES, lambda: _forget(new.name))
    _OPS[new.name] = new


def _forget(name: str) -> None:
    del _OPS[name]
    parts_graph.cache_clear()
