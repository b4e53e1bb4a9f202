"""Fused ops, each declared by the ops it replaces. Whether fused or not is faster is for timing to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penstock.ir.graph import Node, Type, Value
from penstock.ir.op import emit, fused
from penstock.ir.ops.attention import example_extras
from penstock.ir.ops.examples import context_of, example, fill, ragged, table
from penstock.ir.ops.position import example_freqs


@fused(example=example)
def add_rms_norm(x: Value, residual: Value, w: Value, *, eps: float, offset: float = 0.0) -> tuple[Value, ...]:
    """(rms_norm(x + residual), x + residual). x, residual: [T,E]; w: [E]."""
    total = emit("add", x, residual)[0]
    return emit("rms_norm", total, w, eps=eps, offset=offset)[0], total


@fused(example=example)
def add_layer_norm(x: Value, residual: Value, w: Value, *bias: Value, eps: float) -> tuple[Value, ...]:
    """(layer_norm(x + residual), x + residual). x, residual: [T,E]; w: [E]; bias: none, or [E]."""
    total = emit("add", x, residual)[0]
    return emit("layer_norm", total, w, *bias, eps=eps)[0], total


@fused(example=example)
def packed_glu(x: Value, *, act: str) -> tuple[Value, ...]:
    """glu of the left and the right half of each row. x: [T,2F] -> [T,F]."""
    half = int(x.type.shape[-1]) // 2
    gate, up = emit("split", x, sizes=(half, half)).outputs
    return (emit("glu", gate, up, act=act)[0],)


@fused(example=example)
def linear_glu(x: Value, w: Value, *, act: str) -> tuple[Value, ...]:
    """packed_glu(linear(x, w)): the gated half of a feed-forward. x: [T,E]; w: [2F,E], gate rows first -> [T,F]."""
    return (emit("packed_glu", emit("linear", x, w)[0], act=act)[0],)


@fused(example=example)
def linear_activate(x: Value, w: Value, *bias: Value, act: str) -> tuple[Value, ...]:
    """activate(linear(x, w, bias)): the first half of a feed-forward without a gate. x: [T,E]; w: [F,E] -> [T,F]."""
    return (emit("activate", emit("linear", x, w, *bias)[0], act=act)[0],)


@fused(example=example)
def linear_norm_linear(
    x: Value, w: Value, residual: Value, gain: Value, w2: Value, *bias2: Value,
    eps: float, offset: float = 0.0, act: str = "",
) -> tuple[Value, ...]:  # fmt: skip
    """A product into the residual stream, the stream's normalisation, and the product that reads it.

    total = linear(x, w) + residual; returns (linear(rms_norm(total), w2, bias2), total), or with `act` linear_glu.
    x: [T,K]; w: [E,K]; residual: [T,E]; gain: [E]; w2: [N,E]; bias2: none, or [N].
    """
    normal, total = emit("add_rms_norm", emit("linear", x, w)[0], residual, gain, eps=eps, offset=offset).outputs
    if act:
        return emit("linear_glu", normal, w2, act=act)[0], total
    return emit("linear", normal, w2, *bias2)[0], total


# What multiplies by matrices, itself or in its parts.
PRODUCTS = frozenset({"linear", "linear_activate", "linear_glu", "linear_norm_linear", "dense_block"})


def matrices(node: Node) -> list[Type]:
    """Types of the weights that a node multiplies by."""
    weights = [v.type for v in node.inputs if v.node.op == "weight"] if node.op in PRODUCTS else []
    return [t for t in weights if len(t.shape) == 2]


@fused(example=example)
def dense_block(
    x: Value, w: Value, residual: Value, gain: Value, w_gated: Value, w_down: Value, gain2: Value, w2: Value,
    *bias2: Value, eps: float, act: str, offset: float = 0.0,
) -> tuple[Value, ...]:  # fmt: skip
    """From an attention's result to the next attention's operands: two linear_norm_linear, the first one gated.

    x: [T,Q]; w: [E,Q]; residual: [T,E]; gain, gain2: [E]; w_gated: [2F,E]; w_down: [E,F]; w2: [N,E]; bias2: none, or
    [N]. Returns (y [T,N], total [T,E]).
    """
    norm = {"eps": eps, "offset": offset}
    h, total = emit("linear_norm_linear", x, w, residual, gain, w_gated, act=act, **norm).outputs
    return tuple(emit("linear_norm_linear", h, w_down, total, gain2, w2, *bias2, **norm).outputs)


def _rope_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    block = int(types[1].shape[3])
    rows, positions, *_ = ragged(sizes, context_of(sizes, block), device)
    head = [fill(t, sizes, generator, device) for t in types[:2]]
    # Factors about one, as models have them: larger ones make scores so sharp that rounding decides between keys.
    norms = [1 - attrs.get("offset", 0.0) + 0.25 * fill(t, sizes, generator, device) for t in types[6:]]
    freqs = example_freqs(types[3], sizes, device)
    return [*head, positions, freqs, rows, table(sizes, generator, device), *norms]


@fused(writes={1: 1}, example=_rope_example)
def rope_append(
    qkv: Value, kv: Value, positions: Value, freqs: Value, rows: Value, block_table: Value, *norms: Value,
    heads: int, scale: float = 1.0, interleaved: bool = False, eps: float = 0.0, offset: float = 0.0,
) -> tuple[Value, ...]:  # fmt: skip
    """Split [q|k|v], normalise q and k by head where `norms` has their two weights, rotate both, append k and v.

    qkv: [T,(H+2K)*D]; kv: [N,2,K,B,D], replaced in place; norms: none, or two [D]; the rest as in `rope`, `kv_append`.
    Returns (q [T,H*D], kv).
    """
    kv_heads, size = int(kv.type.shape[2]), int(kv.type.shape[4])
    q, k, v = emit("split", qkv, sizes=(heads * size, kv_heads * size, kv_heads * size)).outputs
    if norms:
        q = emit("head_rms_norm", q, norms[0], heads=heads, eps=eps, offset=offset)[0]
        k = emit("head_rms_norm", k, norms[1], heads=kv_heads, eps=eps, offset=offset)[0]
    turn = {"scale": scale, "interleaved": interleaved or None}
    q = emit("rope", q, positions, freqs, rows, heads=heads, **turn)[0]
    k = emit("rope", k, positions, freqs, rows, heads=kv_heads, **turn)[0]
    return q, emit("kv_append", kv, k, v, positions, rows, block_table)[0]


def _rope_attention_example(
    types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
) -> list[Any]:
    names = attrs.get("extras", ())
    last = len(types) - len(names)
    parts = _rope_example((*types[:6], *types[9:last]), attrs, sizes, generator, device)
    spans = ragged(sizes, context_of(sizes, int(types[1].shape[3])), device)[2:]
    return [*parts[:6], *spans, *parts[6:], *example_extras(names, types[last:], generator, device)]


@fused(writes={1: 1}, example=_rope_attention_example)
def rope_attention(
    qkv: Value, kv: Value, positions: Value, freqs: Value, rows: Value, block_table: Value,
    query_start: Value, query_len: Value, context_len: Value, *norms_and_extras: Value,
    heads: int, scale: float, factor: float = 1.0, interleaved: bool = False, window: int = 0, softcap: float = 0.0,
    eps: float = 0.0, offset: float = 0.0, extras: tuple[str, ...] = (),
) -> tuple[Value, ...]:  # fmt: skip
    """rope_append, then attention of its queries over the cache that it leaves.

    Inputs as in both, the extras last; `factor` is rope_append's scale, `scale` that of attention. Positions are those
    that the contexts imply: row s's query i stands at context_len[s] - query_len[s] + i. Returns (y [T,H*D], kv).
    """
    last = len(norms_and_extras) - len(extras)
    norms, given = norms_and_extras[:last], norms_and_extras[last:]
    norm = {"eps": eps, "offset": offset} if norms else {}
    operands = (qkv, kv, positions, freqs, rows, block_table, *norms)
    turn = {"scale": factor, "interleaved": interleaved or None}
    q, kv = emit("rope_append", *operands, heads=heads, **turn, **norm).outputs
    spans = (query_start, query_len, context_len, block_table)
    options = {"window": window, "softcap": softcap or None, "extras": extras or None}
    return emit("attention", q, kv, *spans, *given, heads=heads, scale=scale, **options)[0], kv
