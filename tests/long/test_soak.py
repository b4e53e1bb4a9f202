"""Two thousand requests through one engine, every tenth aborted: nothing leaks, and nobody's text changes."""

from __future__ import annotations

import gc
import queue
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.runtime.intake import Submission
from penstock.runtime.loop import Loop
from penstock.runtime.open import open_loop
from penstock.runtime.requests import RequestOutput, SamplingParams
from tests.long import results

pytestmark = pytest.mark.long

REQUESTS, WARM_UP, OUTSTANDING = 2000, 200, 24
ABORTED = 0.1
GROWTH = 64 << 20  # bytes


def resident() -> int:
    """Bytes of this process in memory."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) << 10


class Crowd:
    """Random requests by number, the same each time; who is to be aborted, and after how many tokens."""

    def __init__(self, seed: int = 5) -> None:
        draw = random.Random(seed)
        self.prompts = [tuple(draw.choices(range(2, 300), k=draw.randint(1, 90))) for _ in range(REQUESTS)]
        self.params = [
            SamplingParams(
                temperature=draw.choice([0.0, 0.9]), seed=i, top_k=40, max_tokens=draw.randint(1, 24), ignore_eos=True
            )
            for i in range(REQUESTS)
        ]
        self.aborts = {i: draw.randint(0, 6) for i in draw.sample(range(REQUESTS), int(ABORTED * REQUESTS))}


@pytest.fixture(scope="module")
def loop(tiny_engine: Path) -> Iterator[Loop]:
    running = open_loop(tiny_engine)
    yield running
    running.close()


def test_two_thousand_requests(loop: Loop) -> None:
    crowd, start = Crowd(), time.perf_counter()
    ends: dict[int, RequestOutput] = {}
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

    def submit(index: int) -> None:
        loop.submit(Submission(str(index), crowd.prompts[index], crowd.params[index], news.put, None, True))  # type: ignore[arg-type]
        if crowd.aborts.get(index) == 0:  # most of these are still waiting for a slot
            loop.abort(str(index))

    waiting, before = list(range(REQUESTS))[::-1], 0
    for _ in range(OUTSTANDING):
        submit(waiting.pop())
    while len(ends) < REQUESTS:
        news_of = news.get(timeout=60)
        assert isinstance(news_of, RequestOutput), news_of
        index = int(news_of.request_id)
        if news_of.finished:
            assert index not in ends, "a request ended twice"
            ends[index] = news_of
            if len(ends) == WARM_UP:
                gc.collect()
                before = resident()
            if waiting:
                submit(waiting.pop())
        elif len(news_of.outputs[0].token_ids) == crowd.aborts.get(index):
            loop.abort(str(index))
    gc.collect()
    growth = resident() - before
    executor = loop.executor
    loop.call(executor.scheduler.check)
    reasons = Counter(str(end.outputs[0].finish_reason) for end in ends.values())
    used = executor.kv.pool.num_used
    results.write(
        "soak", requests=REQUESTS, ends=reasons, steps=executor.stats.steps, generated=executor.stats.generated_tokens,
        blocks_in_use=used, rss_growth_bytes=growth, seconds=time.perf_counter() - start,
    )  # fmt: skip
    assert used == 0 and not executor.busy and executor.kv.pool.num_free == executor.kv.pool.num_usable
    assert growth <= GROWTH, f"{growth / 2**20:.0f} MiB more than after {WARM_UP} requests"
    assert reasons["abort"] >= 0.05 * REQUESTS and set(reasons) == {"abort", "length"}
    for index, end in ends.items():
        done = end.outputs[0]
        assert done.finish_reason == "length" or index in crowd.aborts
        assert done.finish_reason == "abort" or len(done.token_ids) == crowd.params[index].max_tokens
    check_alone(loop, crowd, ends)


def check_alone(loop: Loop, crowd: Crowd, ends: dict[int, RequestOutput]) -> None:
    """Every fortieth again with nobody beside it: the same tokens, or those up to its abort."""
    for index in range(0, REQUESTS, 40):
        done: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        loop.submit(Submission("alone", crowd.prompts[index], crowd.params[index], done.put))  # type: ignore[arg-type]
        alone = done.get(timeout=60).outputs[0].token_ids
        crowded = ends[index].outputs[0].token_ids
        assert alone[: len(crowded)] == crowded
