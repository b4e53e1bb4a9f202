"""What fusing and CUDA graphs are worth here: the same model without each, everything else equal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

from penstock.bench.figures import Effort
from penstock.bench.latency import PROMPT, Rate, decode_rate, settle
from penstock.bench.records import Record
from penstock.bench.subject import Opened, Subject, open_subject
from penstock.compiler.progress import Progress
from penstock.engine.manifest import Engine
from penstock.errors import OptionError
from penstock.ir.lazy import torch
from penstock.ir.op import vocabulary
from penstock.kernels.tactic import PARTS
from penstock.runtime.batch import Batch, Standing
from penstock.runtime.open import Memory, open_backend

STEPS = 15
BATCHES = (1, 8)


def claims(
    subject: Subject, arguments: Mapping[str, Any], progress: Progress, repeats: int, new: int
) -> Iterator[Record]:
    """Builds the model twice, the second time with every fused operation as its parts.

    Raises OptionError before any work for fewer than two repeats, which have no spread, or fewer than two new tokens.
    """
    if repeats < 2:
        raise OptionError(f"--repeats {repeats} has no spread, without which a quotient says nothing; give at least 2")
    Effort(repeats=repeats, new=new)
    fused, opened = _rates(subject, arguments, progress, repeats, new)
    pinned = {op.name: PARTS for op in vocabulary() if op.parts is not None}
    apart, _ = _rates(subject, {**arguments, "tactics": pinned}, progress, repeats, new)
    for batch, rate in fused.items():
        yield fusion(opened, batch, rate, apart[batch])
    if opened.engine.device.kind == "cuda":
        yield graphs(opened)


def fusion(opened: Opened, batch: int, fused: Rate, apart: Rate) -> Record:
    """How many times faster, with the spread that the two rates' own spreads make."""
    times = fused.value / apart.value
    spread = times * (fused.spread / fused.value + apart.spread / apart.value)
    note = (
        f"decode at batch {batch}: as timing chose {fused.value:.1f} ± {fused.spread:.2g} tok/s, all fused operations "
        f"as their parts {apart.value:.1f} ± {apart.spread:.2g}"
    )
    if abs(times - 1) <= spread:
        note += "; no difference beyond the spread"
    return opened.figure(f"claim_fusion_bs{batch}", times, "times", spread=spread, note=note)


def _rates(
    subject: Subject, arguments: Mapping[str, Any], progress: Progress, repeats: int, new: int
) -> tuple[dict[int, Rate], Opened]:
    """The decode rate by batch, of an engine that is closed again."""
    with open_subject(subject, progress, **arguments) as opened:
        settle(opened.llm)
        fitting = [batch for batch in BATCHES if not opened.refusal(batch, PROMPT + new)]
        return {batch: decode_rate(opened.llm, batch, repeats, opened.vocab, new) for batch in fitting}, opened


def graphs(opened: Opened) -> Record:
    """A step of one token, its launches one by one from Python, against the replay of its captured graph."""
    engine, batch = opened.engine, Batch(context=PROMPT)
    backend: Any = open_backend(engine, opened.llm.engine_dir, Memory(), batch.limits(engine.profile), lambda _: None)
    try:
        replay, eager = _both_ways(engine, backend, batch)
    finally:
        backend.close()
    note = f"one decode step to its end: replayed {replay * 1e3:.3f} ms, launch by launch {eager * 1e3:.3f} ms"
    return opened.figure("claim_graphs", eager / replay, "times", note=note)


def _both_ways(engine: Engine, backend: Any, batch: Batch) -> tuple[float, float]:
    """Seconds of the step: replayed, and launched eagerly."""
    standing = Standing(engine, backend, batch)
    standing.run()
    bound, captured = backend.graphs.exact(1, 1, 1)
    return _seconds(standing, captured.graph.replay), _seconds(standing, bound.run)


def _seconds(standing: Standing, run: Callable[[], object]) -> float:
    """The median of several, each on the same state."""
    times = []
    for _ in range(STEPS):
        standing.run()  # sets the lengths back
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)
