"""What an op costs at least: bytes of memory that it must move and operations of its matrix products. No torch.

Every input is read once and every result written once, whatever an implementation does besides. Of tables only the rows
that are looked up count, of pools the blocks that a step touches. Operations are those of matrix products, two for a
multiplication and an addition: the rate that they are compared with is the matrix units', and all other arithmetic
hides behind its bytes. Activations pass from op to op within a cache's reach: there a rate over memory's is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from penstock.ir.graph import Attr, Node, Type, Value
from penstock.ir.op import get, parts_graph
from penstock.ir.ops.examples import context_of, example_blocks, singles_beside
from penstock.ir.ops.state import HEADER, ROW

Sizes = Mapping[str, int]
Attrs = tuple[tuple[str, Attr], ...]


class Cost(NamedTuple):
    """The least that an op moves and multiplies."""

    bytes: float
    flops: float

    def __add__(self, other: object) -> Cost:
        assert isinstance(other, Cost)
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def cost(
    op: str, inputs: Sequence[Type], outputs: Sequence[Type], attrs: Attrs, sizes: Sizes, context: int | None = None
) -> Cost:
    """Bytes and operations of an op on these types.

    sizes: T tokens, S sequences, L rows of logits, M entries of a block-table row, U numbers of the upload. context:
    tokens of each sequence before the step's own; None: as many as the op's timing example assumes.
    """
    streamed = _streamed(op, inputs, outputs, attrs, sizes)
    return Cost(streamed, 0.0) + _special(op, tuple(inputs), tuple(outputs), attrs, sizes, context)


def seconds(cost: Cost, read_bytes_per_s: float, flops_per_s: float) -> float:
    """The least time at these rates, if bytes and operations hide behind each other entirely."""
    return max(cost.bytes / read_bytes_per_s, cost.flops / flops_per_s)


def seen(queries: int, context: int, window: int = 0) -> int:
    """Keys that consecutive queries behind `context` tokens attend to, summed; `window` > 0: at most that many each."""
    whole = queries * context + queries * (queries + 1) // 2
    if not window or context + queries <= window:
        return whole
    first = max(0, min(queries, window - context))  # queries whose keys are all within the window
    return first * context + first * (first + 1) // 2 + (queries - first) * window


def _streamed(op: str, inputs: Sequence[Type], outputs: Sequence[Type], attrs: Attrs, sizes: Sizes) -> float:
    """Bytes of operands that are read or written whole: not those replaced in part, of pools, or looked up in."""
    writes = get(op).writes or {}
    rows = _looked_up(op, tuple(inputs), attrs)
    read = [t for i, t in enumerate(inputs) if i not in writes and i not in rows and not _is_pool(t)]
    written = [t for i, t in enumerate(outputs) if i not in writes.values()]
    return float(sum(t.nbytes(sizes) for t in (*read, *written) if "U" not in t.symbols))


# op -> the inputs of which only some rows are read
_LOOKED_UP = {"embedding": (1,), "take_rows": (0,), "adjust": (1,), "logprobs": (1, 3), "moe": (3, 4, 5, 6)}


def _looked_up(op: str, inputs: tuple[Type, ...], attrs: Attrs) -> frozenset[int]:
    """Of a fused op the inputs that every part which reads them looks up in."""
    if get(op).parts is None:
        return frozenset(_LOOKED_UP.get(op, ()))
    graph = parts_graph(op, inputs, attrs)
    return frozenset(
        int(leaf.name)
        for leaf in graph.leaves("input")
        if all(_only_rows(node, leaf[0]) for node in graph.users.get(leaf[0], ()))
    )


def _only_rows(reader: Node, value: Value) -> bool:
    rows = _looked_up(reader.op, tuple(v.type for v in reader.inputs), reader.attrs)
    return all(i in rows for i, each in enumerate(reader.inputs) if each == value)


def _is_pool(type: Type) -> bool:
    return "N" in type.symbols


def _special(
    op: str, inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, context: int | None
) -> Cost:
    """Products, and the rows of tables, pools and slots; for a fused op the sum over its parts."""
    if get(op).parts is None:
        rule = _RULES.get(op)
        return rule(inputs, outputs, attrs, sizes, context) if rule else Cost(0.0, 0.0)
    total = Cost(0.0, 0.0)
    for node in parts_graph(op, inputs, attrs).nodes:
        if not node.is_leaf:
            total += _special(node.op, tuple(v.type for v in node.inputs), node.types, node.attrs, sizes, context)
    return total


Rule = Callable[[tuple[Type, ...], tuple[Type, ...], Attrs, Sizes, int | None], Cost]


def _linear(inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, _: int | None) -> Cost:
    return Cost(0.0, 2.0 * prod(outputs[0].concrete(sizes)) * prod(inputs[0].concrete(sizes)[-1:]))


def _attention(
    inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, context: int | None
) -> Cost:
    """Keys and values of every sequence once, and two products of every query with those it sees."""
    pool, given = inputs[1], dict(attrs)
    _, _, kv_heads, block, size = (d if isinstance(d, int) else 0 for d in pool.shape)
    before = _context(inputs, block, sizes) if context is None else context
    heads, window = int(str(given["heads"])), int(str(given.get("window", 0)))
    read = multiplied = 0
    base, extra = divmod(sizes["T"], sizes["S"])
    rows = [(base + 1, before, extra), (base, before, sizes["S"] - extra)]
    if context is None and (beside := singles_beside(sizes)):
        rows = [(1, before, beside), (sizes["T"] - beside, 0, 1)]
    for queries, ahead, count in rows:
        keys = min(ahead + queries, window + queries - 1) if window else ahead + queries
        read += count * keys if queries else 0
        multiplied += count * seen(queries, ahead, window)
    return Cost(2.0 * read * kv_heads * size * pool.format.bytes, 4.0 * multiplied * heads * size)


def _encoder_attention(
    inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, _: int | None
) -> Cost:
    """Two products of every token with all of its sequence, where all are alike."""
    width, (base, extra) = int(inputs[0].concrete(sizes)[1]), divmod(sizes["T"], sizes["S"])
    pairs = (sizes["S"] - extra) * base**2 + extra * (base + 1) ** 2
    return Cost(0.0, 4.0 * pairs * width)


def _cross_attention(
    inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, context: int | None
) -> Cost:
    """Keys and values of every input once, `context` tokens each, and two products of every query with all of them."""
    pool, width = inputs[1], int(inputs[0].concrete(sizes)[1])
    _, _, kv_heads, block, size = pool.concrete({**sizes, "N": 1})
    seen = max(1, _context(inputs, block, sizes)) if context is None else context
    read = 2.0 * min(sizes["S"], sizes["T"]) * seen * kv_heads * size * pool.format.bytes
    return Cost(read, 4.0 * sizes["T"] * seen * width)


def _latent_attention(
    inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, context: int | None
) -> Cost:
    """As `attention` of one KV head, whose values are part of its keys."""
    whole, given = _attention(inputs, outputs, attrs, sizes, context), dict(attrs)
    width = int(inputs[1].concrete({"N": 1})[4])
    return Cost(whole.bytes / 2, whole.flops * (1 + int(str(given["rank"])) / width) / 2)


def _head_linear(
    inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, _: int | None
) -> Cost:
    return Cost(0.0, 2.0 * sizes["T"] * prod(inputs[1].concrete(sizes)))


def _context(inputs: tuple[Type, ...], block: int, sizes: Sizes) -> int:
    """Tokens before a step's own in the op's example."""
    return max(0, context_of({"N": example_blocks(inputs, sizes), **sizes}, block))


def _append(inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, _: int | None) -> Cost:
    """What is written into the pool: as many numbers as are read beside it."""
    return Cost(float(sum(prod(t.concrete(sizes)) for t in inputs[1:3]) * inputs[0].format.bytes), 0.0)


def _by_slot(inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, _: int | None) -> Cost:
    """Each sequence's state, read and written."""
    return Cost(2.0 * sizes["S"] * inputs[0].nbytes({"N": 1}), 0.0)


def _gather(inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, _: int | None) -> Cost:
    """The rows that are looked up, as many bytes as the result."""
    return Cost(float(outputs[0].nbytes(sizes)), 0.0)


def _moe(inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, _: int | None) -> Cost:
    """The weights of the experts that tokens go to, where all are equally likely, and the products of each token's."""
    tokens, chosen = inputs[1].concrete(sizes)
    count, wide, width = inputs[3].concrete(sizes)
    active = count * (1 - (1 - chosen / count) ** tokens)
    read = sum(t.nbytes(sizes) for t in inputs[3:])
    return Cost(read * active / count, 3.0 * tokens * chosen * wide * width)


def _prepare(inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, _: int | None) -> Cost:
    """The upload's rows, and from the slots as much as is handed on."""
    return Cost(float(_upload(sizes) + sum(t.nbytes(sizes) for t in outputs[1:])), 0.0)


def _commit(inputs: tuple[Type, ...], outputs: tuple[Type, ...], attrs: Attrs, sizes: Sizes, _: int | None) -> Cost:
    """The upload's rows, each row's length read and written, and a token for each row that samples."""
    return Cost(float(_upload(sizes) + 4 * (2 * sizes["S"] + sizes["L"])), 0.0)


def _upload(sizes: Sizes) -> int:
    return 4 * (HEADER + ROW * sizes["S"])


_RULES: dict[str, Rule] = {
    "linear": _linear, "attention": _attention, "kv_append": _append, "embedding": _gather, "take_rows": _gather,
    "moe": _moe, "causal_conv": _by_slot, "selective_scan": _by_slot, "delta_scan": _by_slot,
    "latent_attention": _latent_attention, "latent_append": _append, "head_linear": _head_linear,
    "encoder_attention": _encoder_attention, "cross_attention": _cross_attention,
    "prefix_attention": _attention,
    "prepare": _prepare, "commit": _commit,
}  # fmt: skip
