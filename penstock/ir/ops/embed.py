"""Token embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.ir.graph import Type
from penstock.ir.op import op
from penstock.ir.ops.examples import fill, integers


def _example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    tokens, weights = types
    return [
        integers(0, int(weights.shape[0]), tokens.concrete(sizes), generator, device),
        fill(weights, sizes, generator, device),
    ]


@op(lambda tokens, table: Type((*tokens.shape, table.shape[1]), table.format), example=_example)
def embedding(tokens: Any, table: Any) -> Any:
    """table[tokens]. tokens: i32[T], table: [V,E] -> [T,E]."""
    return table[tokens.long()]
