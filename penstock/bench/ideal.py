"""The roof of a workload: how fast its requests could be served at best, were they all there at the start."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.bench.requests import Asked
from penstock.bench.roofs import AttentionCost
from penstock.engine.manifest import Engine
from penstock.kernels.roof import Roof


@dataclass(frozen=True, slots=True)
class Ideal:
    """Seconds. `serial`: one kernel after another, each at the rate that bounds it: a step's products take the longer
    of their weights' bytes and their operations, and its attention follows them. `overlapped`: the bytes of a step's
    attention hide behind the operations of its products, or these behind those.
    """

    serial: float
    overlapped: float


def ideal(engine: Engine, roof: Roof, requests: Sequence[Asked], batch: int, reuse: bool) -> Ideal:
    """Requests are served in order, at most `batch` at once. A prompt's tokens, less those that `reuse` finds, cost
    their operations, in steps that read no weights of their own; then every step gives each running request a token.
    """
    work, attention = engine.work, AttentionCost(engine)
    block = engine.profile.block_size
    running: list[tuple[int, int]] = []  # (step at which it ends, tokens it then has)
    waiting, step, context = list(reversed(requests)), 0, 0
    serial = overlapped = 0.0
    while waiting or running:
        while waiting and len(running) < batch:
            each = waiting.pop()
            found = min(each.shared, len(each.prompt) - 1) // block * block if reuse else 0
            new = len(each.prompt) - found
            operations = new * work["flops_per_token"] + work["flops_per_logit"] + attention.flops(new, found)
            serial += operations / roof.flops_per_s
            overlapped += operations / roof.flops_per_s
            if each.new > 1:
                heapq.heappush(running, (step + each.new - 1, len(each.prompt) + each.new - 1))
                context += len(each.prompt)
        if not running:
            continue
        rows = len(running)
        context += rows
        products = rows * (work["flops_per_token"] + work["flops_per_logit"])
        read = context * work["kv_bytes_per_token"]
        scores = rows * attention.flops(1, context // rows)
        serial += roof.seconds(work["weight_bytes"], products) + roof.seconds(read, scores)
        overlapped += roof.seconds(work["weight_bytes"] + read, products + scores)
        step += 1
        while running and running[0][0] == step:
            context -= heapq.heappop(running)[1]
    return Ideal(serial, overlapped)
