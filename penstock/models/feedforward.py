"""Feed-forwards: what is done to each token by itself."""

from __future__ import annotations

from penstock.ir import Value, emit
from penstock.models.step import Weights
from penstock.spec import Mlp


def mlp(x: Value, spec: Mlp, weights: Weights) -> Value:
    """The gated feed-forward, [T,E] -> [T,E]. (Shazeer 2020.)"""
    gate = weights.linear(x, "gate", spec.bias)
    up = weights.linear(x, "up", spec.bias)
    return weights.linear(emit("glu", gate, up, act=spec.act)[0], "down", spec.bias)
