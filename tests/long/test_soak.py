"""Twenty thousand requests through one engine, every tenth aborted: nothing leaks, and nobody's text changes."""

from __future__ import annotations

import gc
import queue
import random
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.engine import store
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.loop import Loop
from penstock.runtime.requests import SamplingParams
from penstock.runtime.step import CpuBackend
from tests.long import results

pytestmark = pytest.mark.long

REQUESTS, WARM_UP, OUTSTANDING, ALONE = 20_000, 2_000, 48, 50
ABORT, ABORTED = 0.12, 0.1  # of all: who is asked to end, some when they have ended, and who at least does
BLOCKS = 40  # of 16 tokens, for 16 slots with up to 10 each
GROWTH = 16 << 20  # bytes: under a kilobyte for each request after the warm-up


def resident() -> int:
    """Bytes of this process in memory."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def fail(tokens: list[int], logits: Any) -> Any:
    if len(tokens) == 2:
        raise ValueError("enough")
    return logits


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several": {"n": 2},
    "beams": {"use_beam_search": True, "n": 3},
    "penalised": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "logprobs": 2},
    "scored": {"prompt_logprobs": 1},
    "failing": {"logits_processors": [fail]},
}


class End(NamedTuple):
    """What is kept of a request that has ended: little, since the memory of 20,000 is measured."""

    reason: str
    token_ids: tuple[int, ...]


class Crowd:
    """Random requests by number, the same each time; who is to be aborted, and after how many tokens."""

    def __init__(self, seed: int = 5) -> None:
        draw = random.Random(seed)
        heads = [tuple(draw.choices(range(2, 300), k=50)) for _ in range(6)]
        begin = [draw.choice(heads) if draw.random() < 0.4 else () for _ in range(REQUESTS)]
        self.prompts = [head + tuple(draw.choices(range(2, 300), k=draw.randint(1, 40))) for head in begin]
        self.aborts = {i: draw.randint(0, 2) for i in draw.sample(range(REQUESTS), int(ABORT * REQUESTS))}
        self.kinds = [
            "plain" if i in self.aborts else draw.choices([*KINDS], [80, 5, 3, 7, 3, 2])[0] for i in range(REQUESTS)
        ]
        most = [
            16 if i in self.aborts else draw.choice([*[8] * 24, 64]) for i in range(REQUESTS)
        ]  # enough to hear of it
        self.params = [
            SamplingParams(
                **{
                    **(
                        {}
                        if self.kinds[i] == "beams"
                        else {"temperature": draw.choice([0.0, 0.9]), "seed": i, "top_k": 40}
                    ),
                    **{"max_tokens": draw.randint(most[i] // 2, most[i]), "ignore_eos": True},
                    **KINDS[self.kinds[i]],
                }
            )
            for i in range(REQUESTS)
        ]


@pytest.fixture(scope="module")
def loop(tiny_model: Path, cache: Path) -> Iterator[Loop]:
    """Of those outstanding a third wait at least; prompts are chunked, mix with those that decode, and share what they
    have in common; blocks are few."""
    options = BuildOptions(device="cpu", cache_dir=cache, max_batch_size=16, max_num_tokens=96, block_size=16)
    directory = build(tiny_model, options)

    def opened() -> Executor:
        engine = store.load(directory)
        backend = CpuBackend(engine, directory)
        backend.num_blocks = (BLOCKS,)
        return Executor(engine, backend, None)

    running = Loop(opened)
    yield running
    running.close()


def test_twenty_thousand_requests(loop: Loop) -> None:
    crowd, start = Crowd(), time.perf_counter()
    ends: dict[int, End] = {}
    news: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    executor = loop.executor

    def submit(index: int) -> None:
        """Posted, as aborts are: who waits for each command hears what steps say too late."""
        hear = partial(_hear, news, index)
        new = Submission(str(index), crowd.prompts[index], crowd.params[index], hear, None, True)
        order = executor.prepare(new)
        loop.post(lambda: executor.submit(order), hear)
        if crowd.aborts.get(index) == 0:  # most of these are still waiting for a slot
            abort(index)

    def abort(index: int) -> None:
        loop.post(lambda: executor.abort(str(index)), partial(_hear, news, index))

    waiting, before = list(range(REQUESTS))[::-1], 0
    for _ in range(OUTSTANDING):
        submit(waiting.pop())
    while len(ends) < REQUESTS:
        index, part = news.get(timeout=60)
        if isinstance(part, Exception) or part.finished:
            assert index not in ends, "a request ended twice"
            ends[index] = _end(part)
            if len(ends) == WARM_UP:
                gc.collect()
                before = resident()
            if waiting:
                submit(waiting.pop())
        elif len(part.outputs[0].token_ids) == crowd.aborts.get(index):
            abort(index)
    gc.collect()
    growth = resident() - before
    loop.call(executor.scheduler.check)
    reasons = Counter(end.reason for end in ends.values())
    (pool,) = (tables.pool for tables in executor.kv.groups)
    used = pool.num_used
    results.write(
        "soak", requests=REQUESTS, ends=reasons, steps=executor.stats.steps,
        generated=executor.scheduler.counters.generated_tokens,
        preemptions=executor.scheduler.counters.preemptions, reused=executor.scheduler.counters.reused_tokens,
        kinds=Counter(crowd.kinds), blocks_in_use=used, rss_growth_bytes=growth, seconds=time.perf_counter() - start,
    )  # fmt: skip
    assert used == 0 and not executor.busy and pool.num_free == pool.num_usable
    assert growth <= GROWTH, f"{growth / 2**20:.0f} MiB more than after {WARM_UP} requests"
    assert reasons["abort"] >= ABORTED * REQUESTS and set(reasons) == {"abort", "length", "error"}
    assert executor.scheduler.counters.reused_tokens > 0
    for index, end in ends.items():
        assert (end.reason == "error") == (crowd.kinds[index] == "failing")
        assert end.reason != "abort" or index in crowd.aborts
        assert end.reason != "length" or len(end.token_ids) == crowd.params[index].max_tokens
    check_alone(loop, crowd, ends)


def check_alone(loop: Loop, crowd: Crowd, ends: dict[int, End]) -> None:
    """Some again with nobody beside them: the same tokens, or those up to their abort."""
    for index in range(0, REQUESTS, REQUESTS // ALONE):
        done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        loop.submit(Submission("alone", crowd.prompts[index], crowd.params[index], partial(_hear, done, index)))
        alone, crowded = _end(done.get(timeout=60)[1]).token_ids, ends[index].token_ids
        assert tuple(alone[: len(crowded)]) == crowded


def _hear(news: queue.SimpleQueue[tuple[int, Any]], index: int, part: Any) -> None:
    news.put((index, part))


def _end(part: Any) -> End:
    if isinstance(part, Exception):
        assert "a logits processor of" in str(part), part
        return End("error", ())
    return End(str(part.outputs[0].finish_reason), tuple(part.outputs[0].token_ids))
