"""Mixers whose memory of a text is of one size, however long: a convolution's last inputs, a state space's state.

Each state has a place for each slot. A row whose tokens in this step are all of its text begins anew, whatever its slot
held; padding rows have slot -1. Rows of x that are of no sequence give zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from penstock.ir.graph import Type, tensor
from penstock.ir.lazy import torch
from penstock.ir.op import op
from penstock.ir.ops.examples import CONTEXT, fill, ragged
from penstock.ir.ops.pointwise import ACTIVATIONS, activation


def _rows(query_start: Any, query_len: Any, context_len: Any, slot_of_row: Any) -> Iterator[tuple[slice, int, bool]]:
    """Of each row that has tokens: where they lie, its slot, and whether its text begins here."""
    given = (each.tolist() for each in (query_start, query_len, context_len, slot_of_row))
    for start, count, context, slot in zip(*given, strict=True):
        if slot >= 0 and count:
            yield slice(start, start + count), slot, count == context


def _example(operands: int) -> Any:
    """Of an op with so many tensors, then spans and slots, then further tensors."""

    def make(
        types: Sequence[Type], attrs: Mapping[str, Any], sizes: Mapping[str, int], generator: Any, device: str
    ) -> list[Any]:
        _, _, *spans = ragged(sizes, CONTEXT, device)
        slots = torch.randperm(sizes["S"], generator=generator, device=device).to(torch.int32)
        made = [fill(t, sizes, generator, device) for t in (*types[:operands], *types[operands + 4 :])]
        return [*made[:operands], *spans, slots, *made[operands:]]

    return make


def _conv(
    state: Type, x: Type, w: Type, query_start: Type, query_len: Type, context_len: Type, slot_of_row: Type,
    bias: Type | None = None, *, act: str,
) -> tuple[Type, Type]:  # fmt: skip
    channels, width = int(w.shape[0]), int(w.shape[1])
    if width < 2 or state.shape != ("N", channels, width - 1) or x.shape[-1] != channels or state.format != x.format:
        raise ValueError(f"{width} inputs of {channels} channels do not fit {x} and a state {state}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias has shape {bias.shape}, expected ({channels},)")
    if act not in ACTIVATIONS:
        raise ValueError(f"activation {act!r} is not one of {', '.join(ACTIVATIONS)}")
    return state, x


@op(_conv, writes={0: 0}, example=_example(3))
def causal_conv(
    state: Any, x: Any, w: Any, query_start: Any, query_len: Any, context_len: Any, slot_of_row: Any, bias: Any = None,
    *, act: str,
) -> tuple[Any, Any]:  # fmt: skip
    """act(sum_i w[:, i] x[t - W + 1 + i] + bias): each channel over its last W inputs, zeros before the first.

    state: [N,C,W-1], of each slot its last inputs, oldest first, replaced in place; x: [T,C]; w: [C,W]; bias: [C];
    query_start, query_len, context_len: i32[S], the last with the step's tokens; slot_of_row: i32[S]. Returns the state
    and [T,C].
    """
    y, width = torch.zeros(x.shape, dtype=torch.float32, device=x.device), w.shape[1]
    for own, slot, fresh in _rows(query_start, query_len, context_len, slot_of_row):
        before = torch.zeros_like(state[slot]) if fresh else state[slot]
        inputs = torch.cat([before, x[own].t()], 1).float()  # [C,W-1+n]
        count = inputs.shape[1] - width + 1
        total = sum(w[:, i, None].float() * inputs[:, i : i + count] for i in range(width))
        y[own] = activation((total if bias is None else total + bias.float()[:, None]).t().contiguous(), act)
        state[slot] = inputs[:, count:].to(state.dtype)
    return state, y


def _scan(
    state: Type, x: Type, dt: Type, decay: Type, dt_bias: Type, skip: Type,
    query_start: Type, query_len: Type, context_len: Type, slot_of_row: Type,
    *, groups: int, least: float = 0.0, most: float = 0.0,
) -> tuple[Type, Type]:  # fmt: skip
    _, heads, size, width = state.shape
    if state.format.name != "f32" or {decay, dt_bias, skip} != {tensor("f32", int(heads))} or dt.shape[-1] != heads:
        raise ValueError(f"state {state}, dt {dt} and f32[{heads}] of decay, bias and skip")
    if int(heads) % groups or x.shape[-1] != int(heads) * int(size) + 2 * groups * int(width):
        raise ValueError(f"{groups} groups of {heads} heads with a state {state} do not fit {x}")
    if least < 0 or (most and most <= least):
        raise ValueError(f"steps from {least} to {most}")
    return state, Type((*x.shape[:-1], int(heads) * int(size)), x.format)


@op(_scan, writes={0: 0}, example=_example(6))
def selective_scan(
    state: Any, x: Any, dt: Any, decay: Any, dt_bias: Any, skip: Any,
    query_start: Any, query_len: Any, context_len: Any, slot_of_row: Any,
    *, groups: int, least: float = 0.0, most: float = 0.0,
) -> tuple[Any, Any]:  # fmt: skip
    """Of each head: s <- exp(-exp(decay) step) s + step x b^T; y = s c + skip x. (Dao and Gu 2024, Mamba-2.)

    state: f32[N,H,P,W], replaced in place; x: [T,H*P+2*G*W], the input of H heads, then b and c of G groups, which
    heads share in equal parts; dt: [T,H], step = softplus(dt + dt_bias), at least `least`, and at most `most` where
    that is not 0; decay, dt_bias, skip: f32[H]; spans and slots as for `causal_conv`. Returns the state and [T,H*P].
    """
    _, heads, size, width = state.shape
    y = torch.zeros((x.shape[0], heads * size), dtype=torch.float32, device=x.device)
    for own, slot, fresh in _rows(query_start, query_len, context_len, slot_of_row):
        steps = softplus(dt[own].float() + dt_bias).clamp(least, most or None)  # [n,H]
        kept = torch.exp(-torch.exp(decay) * steps)
        inputs, b, c = x[own].float().split((heads * size, groups * width, groups * width), -1)
        inputs = inputs.unflatten(-1, (heads, size))
        b, c = (
            each.unflatten(-1, (groups, 1, width)).expand(-1, -1, heads // groups, -1).flatten(1, 2) for each in (b, c)
        )
        s, out = torch.zeros_like(state[slot]) if fresh else state[slot], []
        for t in range(len(inputs)):  # one after another: a token's bits do not depend on how a text is cut
            added = (steps[t, :, None] * inputs[t])[..., None] * b[t, :, None]
            s = kept[t, :, None, None] * s + added
            out.append((s * c[t, :, None]).sum(-1) + skip[:, None] * inputs[t])
        state[slot] = s
        y[own] = torch.stack(out).flatten(1)
    return state, y


def _delta(
    state: Type, x: Type, steps: Type, decay: Type, dt_bias: Type,
    query_start: Type, query_len: Type, context_len: Type, slot_of_row: Type,
) -> tuple[Type, Type]:  # fmt: skip
    _, heads, size, width = (int(d) if isinstance(d, int) else 0 for d in state.shape)
    if state.format.name != "f32" or {decay, dt_bias} != {tensor("f32", heads)} or steps.shape[-1] != 2 * heads:
        raise ValueError(f"state {state}, steps {steps} and f32[{heads}] of decay and bias")
    keys, rest = divmod(int(x.shape[-1]) - heads * width, 2 * size)
    if rest or keys < 1 or heads % keys:
        raise ValueError(f"{heads} heads with a state {state} do not fit {x}")
    return state, Type((*x.shape[:-1], heads * width), x.format)


@op(_delta, writes={0: 0}, example=_example(5))
def delta_scan(
    state: Any, x: Any, steps: Any, decay: Any, dt_bias: Any,
    query_start: Any, query_len: Any, context_len: Any, slot_of_row: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Of each head: s <- exp(-exp(decay) step) s; s <- s + k (beta (v - s^T k))^T; y = s^T q. (Yang et al. 2024, Gated
    Delta Networks.)

    state: f32[N,H,K,V], replaced in place; x: [T,2*G*K+H*V], queries and keys of G heads, which H heads share in equal
    parts, then values; q and k are divided by their norm, and q by the root of K; steps: [T,2*H], beta = sigmoid of the
    first half, step = softplus(the second + dt_bias); decay, dt_bias: f32[H]; spans and slots as for `causal_conv`.
    Returns the state and [T,H*V].
    """
    _, heads, size, width = state.shape
    keys = (x.shape[-1] - heads * width) // (2 * size)
    y = torch.zeros((x.shape[0], heads * width), dtype=torch.float32, device=x.device)
    for own, slot, fresh in _rows(query_start, query_len, context_len, slot_of_row):
        q, k, v = x[own].float().split((keys * size, keys * size, heads * width), -1)
        q, k = (_unit(each.unflatten(-1, (keys, size))).repeat_interleave(heads // keys, 1) for each in (q, k))
        beta, raw = steps[own].float().chunk(2, -1)
        beta, kept = 1 / (1 + torch.exp(-beta)), torch.exp(-torch.exp(decay) * softplus(raw + dt_bias))
        v, q = v.unflatten(-1, (heads, width)), q * size**-0.5
        s, out = torch.zeros_like(state[slot]) if fresh else state[slot], []
        for t in range(len(q)):
            s = kept[t, :, None, None] * s
            known = (s * k[t, :, :, None]).sum(1)
            s = s + k[t, :, :, None] * (beta[t, :, None] * (v[t] - known))[:, None]
            out.append((s * q[t, :, :, None]).sum(1))
        state[slot] = s
        y[own] = torch.stack(out).flatten(1)
    return state, y


def _unit(x: Any) -> Any:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def softplus(x: Any) -> Any:
    """log(1 + exp(x)), which beyond 20 is x in float32."""
    return torch.where(x > 20, x, torch.log1p(torch.exp(x.clamp(max=20))))
