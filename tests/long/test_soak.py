"""Twenty thousand requests through one engine, every tenth aborted: nothing leaks, and nobody's text changes."""

from __future__ import annotations

import gc
import queue
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.runtime.intake import Submission
from penstock.runtime.loop import Loop
from penstock.runtime.open import open_loop
from penstock.runtime.requests import RequestOutput, SamplingParams
from tests.long import results

pytestmark = pytest.mark.long

REQUESTS, WARM_UP, OUTSTANDING, ALONE = 20_000, 2_000, 48, 50
ABORT, ABORTED = 0.12, 0.1  # of all: who is asked to end, some when they have ended, and who at least does
GROWTH = 16 << 20  # bytes: under a kilobyte for each request after the warm-up


def resident() -> int:
    """Bytes of this process in memory."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) << 10


class End(NamedTuple):
    """What is kept of a request that has ended: little, since the memory of 20,000 is measured."""

    reason: str
    token_ids: tuple[int, ...]


class Crowd:
    """Random requests by number, the same each time; who is to be aborted, and after how many tokens."""

    def __init__(self, seed: int = 5) -> None:
        draw = random.Random(seed)
        self.prompts = [tuple(draw.choices(range(2, 300), k=draw.randint(1, 40))) for _ in range(REQUESTS)]
        self.aborts = {i: draw.randint(0, 2) for i in draw.sample(range(REQUESTS), int(ABORT * REQUESTS))}
        most = [16 if i in self.aborts else 8 for i in range(REQUESTS)]  # long enough to hear of it
        self.params = [
            SamplingParams(
                temperature=draw.choice([0.0, 0.9]),
                seed=i,
                top_k=40,
                max_tokens=draw.randint(most[i] // 2, most[i]),
                ignore_eos=True,
            )
            for i in range(REQUESTS)
        ]


@pytest.fixture(scope="module")
def loop(tiny_model: Path, cache: Path) -> Iterator[Loop]:
    """A third of those outstanding wait; prompts are chunked, and mix with those that decode."""
    options = BuildOptions(device="cpu", cache_dir=cache, max_batch_size=16, max_num_tokens=96)
    running = open_loop(build(tiny_model, options))
    yield running
    running.close()


def test_twenty_thousand_requests(loop: Loop) -> None:
    crowd, start = Crowd(), time.perf_counter()
    ends: dict[int, End] = {}
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

    executor = loop.executor

    def submit(index: int) -> None:
        """Posted, as aborts are: who waits for each command hears what steps say too late."""
        new = Submission(str(index), crowd.prompts[index], crowd.params[index], news.put, None, True)  # type: ignore[arg-type]
        job = executor.prepare(new)
        loop.post(lambda: executor.submit(job), news.put)  # type: ignore[arg-type]
        if crowd.aborts.get(index) == 0:  # most of these are still waiting for a slot
            abort(index)

    def abort(index: int) -> None:
        loop.post(lambda: executor.abort(str(index)), news.put)  # type: ignore[arg-type]

    waiting, before = list(range(REQUESTS))[::-1], 0
    for _ in range(OUTSTANDING):
        submit(waiting.pop())
    while len(ends) < REQUESTS:
        news_of = news.get(timeout=60)
        assert isinstance(news_of, RequestOutput), news_of
        index = int(news_of.request_id)
        if news_of.finished:
            assert index not in ends, "a request ended twice"
            ends[index] = End(str(news_of.outputs[0].finish_reason), tuple(news_of.outputs[0].token_ids))
            if len(ends) == WARM_UP:
                gc.collect()
                before = resident()
            if waiting:
                submit(waiting.pop())
        elif len(news_of.outputs[0].token_ids) == crowd.aborts.get(index):
            abort(index)
    gc.collect()
    growth = resident() - before
    loop.call(executor.scheduler.check)
    reasons = Counter(end.reason for end in ends.values())
    used = executor.kv.pool.num_used
    results.write(
        "soak", requests=REQUESTS, ends=reasons, steps=executor.stats.steps, generated=executor.stats.generated_tokens,
        blocks_in_use=used, rss_growth_bytes=growth, seconds=time.perf_counter() - start,
    )  # fmt: skip
    assert used == 0 and not executor.busy and executor.kv.pool.num_free == executor.kv.pool.num_usable
    assert growth <= GROWTH, f"{growth / 2**20:.0f} MiB more than after {WARM_UP} requests"
    assert reasons["abort"] >= ABORTED * REQUESTS and set(reasons) == {"abort", "length"}
    for index, end in ends.items():
        assert end.reason == "length" or index in crowd.aborts
        assert end.reason == "abort" or len(end.token_ids) == crowd.params[index].max_tokens
    check_alone(loop, crowd, ends)


def check_alone(loop: Loop, crowd: Crowd, ends: dict[int, End]) -> None:
    """Some again with nobody beside them: the same tokens, or those up to their abort."""
    for index in range(0, REQUESTS, REQUESTS // ALONE):
        done: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        loop.submit(Submission("alone", crowd.prompts[index], crowd.params[index], done.put))  # type: ignore[arg-type]
        alone, crowded = done.get(timeout=60).outputs[0].token_ids, ends[index].token_ids
        assert tuple(alone[: len(crowded)]) == crowded
