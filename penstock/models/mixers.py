"""Token mixers: what lets a token see those before it."""

from __future__ import annotations

from penstock.ir import Value, emit
from penstock.models.step import Frequencies, Inputs, Weights
from penstock.spec import (
    Alibi,
    Attention,
    DeltaNet,
    Latent,
    Mixer,
    Norm,
    RelativeBias,
    Rope,
    StateSpace,
    attention_factor,
)


def mix(
    x: Value, states: tuple[Value, ...], spec: Mixer, weights: Weights, inputs: Inputs, freqs: Frequencies
) -> tuple[Value, ...]:
    """x: [T,E] and a layer's states -> ([T,E], the states after this step)."""
    match spec:
        case Attention():
            return attention(x, states[0], spec, weights, inputs, freqs)
        case Latent():
            return latent(x, states[0], spec, weights, inputs, freqs)
        case StateSpace():
            return state_space(x, states[0], states[1], spec, weights, inputs)
    return delta_net(x, states[0], states[1], spec, weights, inputs)


def attention(
    x: Value, kv: Value, spec: Attention, weights: Weights, inputs: Inputs, freqs: Frequencies
) -> tuple[Value, Value]:
    """x: [T,E], kv: [N,2,K,B,D] -> ([T,E], kv with this step's keys and values)."""
    q, k, v = (weights.linear(x, part, spec.qkv_bias) for part in "qkv")
    if spec.clip:
        q, k, v = (emit("clip", each, limit=spec.clip)[0] for each in (q, k, v))
    q = _positioned(q, "q_norm", spec.heads, spec, weights, inputs, freqs)
    k = _positioned(k, "k_norm", spec.kv_heads, spec, weights, inputs, freqs)
    kv = emit("kv_append", kv, k, v, inputs.positions, inputs.rows, inputs.block_table)[0]
    spans = (inputs.query_start, inputs.query_len, inputs.context_len, inputs.block_table)
    if spec.prefix:
        return weights.linear(_over_prefix(q, kv, spec, inputs), "o", spec.out_bias), kv
    extras = _extras(spec, weights)
    attrs = {"window": spec.window, "softcap": spec.softcap or None, "extras": tuple(extras) or None}
    y = emit("attention", q, kv, *spans, *extras.values(), heads=spec.heads, scale=spec.scale, **attrs)[0]
    if spec.gated:
        y = emit("gate_rows", y, weights.linear(x, "gate", spec.qkv_bias))[0]
    return weights.linear(y, "o", spec.out_bias), kv


def _over_prefix(q: Value, kv: Value, spec: Attention, inputs: Inputs) -> Value:
    assert inputs.encoder_len is not None
    spans = (inputs.query_start, inputs.query_len, inputs.context_len, inputs.encoder_len, inputs.block_table)
    return emit("prefix_attention", q, kv, *spans, heads=spec.heads, scale=spec.scale)[0]


def cross(x: Value, kv: Value, spec: Attention, weights: Weights, inputs: Inputs) -> Value:
    """x: [T,E], kv: [N,2,K,B,D], which an encoder's run has filled -> [T,E]."""
    assert inputs.encoder_len is not None
    spans = (inputs.query_start, inputs.query_len, inputs.context_len, inputs.encoder_len, inputs.block_table)
    q = weights.linear(x, "q", spec.qkv_bias)
    y = emit("cross_attention", q, kv, *spans, heads=spec.heads, scale=spec.scale)[0]
    return weights.linear(y, "o", spec.out_bias)


def filled(x: Value, kv: Value, spec: Attention, weights: Weights, inputs: Inputs) -> Value:
    """What `cross` looks at: kv with keys and values of an encoder's result x, [T,E]."""
    k, v = (weights.linear(x, part, spec.qkv_bias) for part in "kv")
    return emit("kv_append", kv, k, v, inputs.positions, inputs.rows, inputs.block_table)[0]


def bidirectional(x: Value, spec: Attention, weights: Weights, inputs: Inputs) -> Value:
    """An encoder's attention, each token's to all of its sequence: [T,E] -> [T,E]."""
    q, k, v = (weights.linear(x, part, spec.qkv_bias) for part in "qkv")
    assert spec.kv_heads == spec.heads and isinstance(spec.bias, RelativeBias | None), "what encoders are built with"
    bias = () if spec.bias is None else (_distances(spec.bias, weights, behind=True),)
    spans = (inputs.query_start, inputs.query_len)
    y = emit("encoder_attention", q, k, v, *spans, *bias, heads=spec.heads, scale=spec.scale)[0]
    return weights.linear(y, "o", spec.out_bias)


def _distances(bias: RelativeBias, weights: Weights, behind: bool) -> Value:
    table = weights.of_stack("relative_bias.weight")
    return emit("distances", table, max_distance=bias.max_distance, behind=behind)[0]


def latent(
    x: Value, kv: Value, spec: Latent, weights: Weights, inputs: Inputs, freqs: Frequencies
) -> tuple[Value, Value]:
    """x: [T,E], kv: [N,1,1,B,R+C] -> ([T,E], kv with this step's keys and latents); heads begin with what turns."""
    size, norm = spec.rope.dim, Norm(spec.eps)
    q = x
    if spec.query_rank:
        q = weights.norm(weights.linear(x, "q_down", spec.bias), "q_norm", norm)
    q = _rotated(weights.linear(q, "q"), spec.heads, spec.rope, inputs, freqs)
    q = emit("head_linear", q, weights["keys.weight"], keep=size)[0]
    c, key = emit("split", weights.linear(x, "kv_down", spec.bias), sizes=(spec.rank, size)).outputs
    key = _rotated(key, 1, spec.rope, inputs, freqs)
    where = (inputs.positions, inputs.rows, inputs.block_table)
    kv = emit("latent_append", kv, key, weights.norm(c, "kv_norm", norm), *where)[0]
    spans = (inputs.query_start, inputs.query_len, inputs.context_len, inputs.block_table)
    y = emit("latent_attention", q, kv, *spans, heads=spec.heads, scale=spec.scale, rank=spec.rank)[0]
    return weights.linear(emit("head_linear", y, weights["values.weight"])[0], "o", spec.bias), kv


def state_space(
    x: Value, past: Value, state: Value, spec: StateSpace, weights: Weights, inputs: Inputs
) -> tuple[Value, Value, Value]:
    """x: [T,E], past: [N,C,kernel-1], state: f32[N,H,P,W] -> ([T,E], the convolution's last inputs, the state)."""
    sizes = (spec.size, spec.channels, spec.heads)
    gate, entering, step = emit("split", weights.linear(x, "in", spec.bias), sizes=sizes).outputs
    where = (inputs.query_start, inputs.query_len, inputs.context_len, inputs.slot_of_row)
    bias = (weights["conv.bias"],) if spec.kernel_bias else ()
    past, entering = emit("causal_conv", past, entering, weights["conv.weight"], *where, *bias, act=spec.act).outputs
    heads = (weights[name] for name in ("decay", "step_bias", "skip"))
    limits = {"groups": spec.groups, "least": spec.least_step or None, "most": spec.most_step or None}
    state, y = emit("selective_scan", state, entering, step, *heads, *where, **limits).outputs
    y = weights.norm(emit("glu", gate, y, act=spec.act)[0], "norm", Norm(spec.eps))
    return weights.linear(y, "out", spec.bias), past, state


def delta_net(
    x: Value, past: Value, state: Value, spec: DeltaNet, weights: Weights, inputs: Inputs
) -> tuple[Value, Value, Value]:
    """x: [T,E], past: [N,C,kernel-1], state: f32[N,H,K,V] -> ([T,E], the convolution's last inputs, the state)."""
    sizes = (spec.channels, spec.size, 2 * spec.heads)
    entering, gate, steps = emit("split", weights.linear(x, "in"), sizes=sizes).outputs
    where = (inputs.query_start, inputs.query_len, inputs.context_len, inputs.slot_of_row)
    past, entering = emit("causal_conv", past, entering, weights["conv.weight"], *where, act=spec.act).outputs
    heads = (weights[name] for name in ("decay", "step_bias"))
    state, y = emit("delta_scan", state, entering, steps, *heads, *where).outputs
    y = emit("head_rms_norm", y, weights["norm.weight"], heads=spec.heads, eps=spec.eps)[0]
    return weights.linear(emit("glu", gate, y, act=spec.act)[0], "out"), past, state


def _rotated(x: Value, heads: int, rope: Rope, inputs: Inputs, freqs: Frequencies) -> Value:
    if rope.planar:
        assert inputs.encoder_len is not None
        return emit("prefix_rope", x, inputs.positions, freqs[rope], inputs.rows, inputs.encoder_len, heads=heads)[0]
    how = {"scale": attention_factor(rope), "interleaved": rope.interleaved or None}
    return emit("rope", x, inputs.positions, freqs[rope], inputs.rows, heads=heads, **how)[0]


def _positioned(
    x: Value, norm: str, heads: int, spec: Attention, weights: Weights, inputs: Inputs, freqs: Frequencies
) -> Value:
    """Queries or keys, normalised and rotated as the model does it: [T,heads*D]."""
    x = _normalised(x, norm, heads, spec, weights)
    if spec.rope is None:
        return x
    return _rotated(x, heads, spec.rope, inputs, freqs)


def _normalised(x: Value, name: str, heads: int, spec: Attention, weights: Weights) -> Value:
    if spec.qk_norm is None or spec.qk_norm_over == "row":
        return weights.norm(x, name, spec.qk_norm)
    weight, norm = weights[f"{name}.weight"], spec.qk_norm
    if isinstance(norm, Norm):
        assert spec.qk_norm_over == "head", "no op normalises by root mean square with a weight for each head"
        return emit("head_rms_norm", x, weight, heads=heads, eps=norm.eps, offset=norm.offset)[0]
    assert spec.qk_norm_over == "heads" and not norm.bias, "no op normalises heads with one weight or with a bias"
    return emit("head_layer_norm", x, weight, eps=norm.eps)[0]


def _extras(spec: Attention, weights: Weights) -> dict[str, Value]:
    """What else goes into the scores, by the name under which the op `attention` knows it."""
    extras = {}
    if isinstance(spec.bias, Alibi):
        extras["slopes"] = emit("literal", shape=(spec.heads,), values=spec.bias.slopes)[0]
    if isinstance(spec.bias, RelativeBias):
        extras["distances"] = _distances(spec.bias, weights, behind=False)
    if spec.sinks:
        extras["sinks"] = weights["sinks"]
    return extras
