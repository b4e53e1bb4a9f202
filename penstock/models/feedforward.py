"""Feed-forwards: what is done to each token by itself."""

from __future__ import annotations

from penstock.ir import Value, emit
from penstock.models.step import Weights
from penstock.spec import FeedForward, Mlp, Moe, Router


def feedforward(x: Value, spec: FeedForward, weights: Weights) -> Value:
    """[T,E] -> [T,E]."""
    return mlp(x, spec, weights) if isinstance(spec, Mlp) else moe(x, spec, weights)


def mlp(x: Value, spec: Mlp, weights: Weights) -> Value:
    """One hidden layer, gated (Shazeer 2020) or not."""
    if not spec.gated:
        return weights.linear(emit("activate", weights.linear(x, "up", spec.bias), act=spec.act)[0], "down", spec.bias)
    gate = weights.linear(x, "gate", spec.bias)
    up = weights.linear(x, "up", spec.bias)
    return weights.linear(emit("glu", gate, up, act=spec.act)[0], "down", spec.bias)


def moe(x: Value, spec: Moe, weights: Weights) -> Value:
    """The chosen experts' sum, and the shared expert's where there is one."""
    experts = weights.below("experts")
    operands = [experts["in.weight"], experts["out.weight"]]
    if spec.expert.bias:
        operands += [experts["in.bias"], experts["out.bias"]]
    limit = spec.expert.limit or None
    y = emit("moe", x, *route(x, spec.router, weights), *operands, act=spec.expert.act, limit=limit)[0]
    if not spec.shared:
        return y
    shared = mlp(x, spec.shared, weights.below("shared"))
    if spec.shared_gate:
        shared = emit("gate_rows", shared, weights.linear(x, "shared_gate"))[0]
    return emit("add", y, shared)[0]


def route(x: Value, spec: Router, weights: Weights) -> tuple[Value, ...]:
    """(experts i32[T,k], their weights f32[T,k])."""
    scores = weights.linear(x, "router", spec.bias, out="f32")
    correction = (weights["correction"],) if spec.correction else ()
    attrs = {"chosen": spec.chosen, "score": spec.score, "renormalize": spec.renormalize, "factor": spec.factor}
    if spec.groups:
        attrs |= {"groups": spec.groups, "kept_groups": spec.kept_groups, "group_top": spec.group_top}
    return emit("route", scores, *correction, **attrs).outputs
