"""Token mixers: what lets a token see those before it."""

from __future__ import annotations

from penstock.ir import Value, emit
from penstock.models.step import Inputs, Weights
from penstock.spec import Attention, attention_factor


def attention(
    x: Value, kv: Value, spec: Attention, weights: Weights, inputs: Inputs, freqs: Value
) -> tuple[Value, Value]:
    """x: [T,E], kv: [N,2,K,B,D] -> ([T,E], kv with this step's keys and values)."""
    q, k, v = (weights.linear(x, part, spec.qkv_bias) for part in "qkv")
    if spec.qk_norm:
        norm = {"eps": spec.qk_norm.eps, "offset": spec.qk_norm.offset}
        q = emit("head_rms_norm", q, weights["q_norm.weight"], heads=spec.heads, **norm)[0]
        k = emit("head_rms_norm", k, weights["k_norm.weight"], heads=spec.kv_heads, **norm)[0]
    factor = attention_factor(spec.rope)
    q = emit("rope", q, inputs.positions, freqs, inputs.rows, heads=spec.heads, scale=factor)[0]
    k = emit("rope", k, inputs.positions, freqs, inputs.rows, heads=spec.kv_heads, scale=factor)[0]
    kv = emit("kv_append", kv, k, v, inputs.positions, inputs.rows, inputs.block_table)[0]
    spans = (inputs.query_start, inputs.query_len, inputs.context_len, inputs.block_table)
    y = emit("attention", q, kv, *spans, heads=spec.heads, scale=spec.scale, window=spec.window)[0]
    return weights.linear(y, "o", spec.out_bias), kv
