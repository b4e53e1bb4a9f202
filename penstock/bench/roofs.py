"""How fast at best: the roof of each figure, from the rates that were measured in the same run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from penstock import formats
from penstock.engine.device import Device
from penstock.engine.ideal import AttentionCost
from penstock.engine.manifest import Engine
from penstock.ir.lazy import torch
from penstock.ir.ops.fused import matrices
from penstock.kernels.roof import Roof

ROWS = 8192  # tokens of the sustained products
PAUSE = 0.2  # seconds of products between two waits for the device, which cost a little
SECONDS = 3.0  # how long they run: long enough for power and heat to limit them


def decode_roof(engine: Engine, roof: Roof, batch: int, context: float) -> float:
    """Tokens a second when a step takes the longer of its bytes and its operations: weights once, KV of the context.

    Of a mixture the weights of the experts that the batch is expected to meet.
    """
    work = engine.work
    read = engine.step_bytes(batch) + batch * context * work["kv_bytes_per_token"]
    operations = work["flops_per_token"] + work["flops_per_logit"] + attention_flops(engine, 1, int(context))
    return batch / roof.seconds(read, batch * operations)


def first_token_roof(engine: Engine, roof: Roof, length: int, batch: int = 1) -> float:
    """Seconds: every weight read once, every prompt token multiplied with every matrix, one row of logits each.

    Of a batch queued at once the mean, its prompts one after another: waiting is half of it.
    """
    work = engine.work
    operations = length * work["flops_per_token"] + work["flops_per_logit"] + attention_flops(engine, length, 0)
    return roof.seconds(engine.step_bytes(length), operations * (batch + 1) / 2)


def attention_flops(engine: Engine, queries: int, context: int) -> float:
    """Operations of one sequence's attention over all layers, its queries behind `context` tokens."""
    return AttentionCost(engine).flops(queries, context)


def sustained(engine: Engine, device: Device, duration: float = SECONDS) -> float | None:
    """Operations a second of the model's own products at ROWS tokens, one after another for `duration` seconds.

    A burst is faster where power limits the device. None on a CPU, where one round would take that long.
    """
    if device.kind != "cuda":
        return None
    products = _products(engine)
    round_flops = sum(2.0 * ROWS * prod(shape) * count for shape, count in products.items())
    runs = [_product(shape, engine.format) for shape, count in products.items() for _ in range(count)]
    _rounds(runs, 1)  # the library's first choice of a kernel is not part of it
    at_once = max(1, int(PAUSE / _rounds(runs, 1)))
    done, taken = 0, 0.0
    while taken < duration:
        taken += _rounds(runs, at_once)
        done += at_once
    return done * round_flops / taken


def _rounds(runs: Sequence[Callable[[], object]], count: int) -> float:
    """Seconds of so many rounds, to their end."""
    start = time.perf_counter()
    for _ in range(count):
        for run in runs:
            run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _products(engine: Engine) -> dict[tuple[int, ...], int]:
    """Shapes of the matrices that every token is multiplied with, and how often each, in the least whole numbers."""
    graph = engine.programs["decode"].phases["forward"].graph
    weights = (t for n in graph.nodes for t in matrices(n) if "T" in n.types[0].symbols)
    counts = Counter(t.concrete({}) for t in weights)
    least = min(counts.values())
    return {shape: max(1, round(count / least)) for shape, count in counts.items()}


def _product(shape: tuple[int, ...], format: str) -> Any:
    """A product of ROWS random rows with a random matrix, in memory of its own."""
    dtype = getattr(torch, formats.parse(format).torch_dtype)
    weight = torch.randn(shape, device="cuda", dtype=dtype)
    x = torch.randn(ROWS, shape[1], device="cuda", dtype=dtype)
    out = torch.empty(ROWS, shape[0], device="cuda", dtype=dtype)

    def run() -> None:
        torch.mm(x, weight.t(), out=out)

    return run
