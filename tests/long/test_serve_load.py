"""The HTTP process under its full load, before a simulated engine: on two cores, engine and clients included."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from tests.cpu.serve.crowd import Server, load, silent, streams
from tests.long import results

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
STREAMS = 500
LIMIT = 50.0  # milliseconds of latency that the HTTP process may add, at P99
SLOW_STREAMS, SLOW_TEXTS, SLOW_TOKENS, STEP = 100, 128, 400, 0.025
MOST_RESIDENT = 192 << 20  # bytes of the HTTP process behind 1.25 million tokens; 92 MiB were seen
MOST_GROWTH = 128 << 20  # bytes for one client that does not read


@pytest.fixture(autouse=True)
def two_cores() -> None:
    """Processes started from here inherit them."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])


def test_five_hundred_streams_at_twenty_thousand_tokens_a_second() -> None:
    found = load(STREAMS / 20_000, STREAMS, 1000)
    results.write("serve_load_20k", limit_ms=LIMIT, **found)
    assert found["tokens_per_s"] > 0.98 * 20_000
    assert found["added_latency_ms"]["p99"] < LIMIT


def test_fifty_thousand_tokens_a_second_leave_nothing_behind() -> None:
    found = load(STREAMS / 50_000, STREAMS, 2500)
    results.write("serve_load_50k", limit_ms=LIMIT, **found)
    assert found["tokens_per_s"] > 0.99 * 50_000  # of the 1 % that was behind, 50 ms would be full after 5 s
    assert found["added_latency_ms"]["p99"] < LIMIT and found["p99_ms_second_half"] < LIMIT
    assert found["server_resident"] < MOST_RESIDENT


def beside(slow: bool) -> dict[str, float]:
    """What a hundred streams see, alone or beside one who asks for much and does not read."""
    with Server(STEP) as server:
        asyncio.run(streams(server.port, 5, 20))
        before, most, start = server.resident, 0, time.monotonic()
        at = silent(server.port, SLOW_TOKENS, n=SLOW_TEXTS) if slow else None
        crowd = asyncio.run(streams(server.port, SLOW_STREAMS, SLOW_TOKENS))
        most = server.resident
        if at is not None:
            at.close()
        assert not crowd.broken and crowd.tokens == SLOW_STREAMS * SLOW_TOKENS
        seconds = time.monotonic() - start
        end = time.monotonic() + 10
        while server.health()["running"]:
            assert time.monotonic() < end, "its request goes on"
            time.sleep(0.1)
        return {"p50_ms": crowd.p(50), "p99_ms": crowd.p(99), "growth": most - before, "seconds": seconds}


def test_a_slow_reader_does_not_slow_the_others() -> None:
    without, with_slow = beside(False), beside(True)
    results.write("serve_slow_reader", streams=SLOW_STREAMS, slow_texts=SLOW_TEXTS, without=without, beside=with_slow)
    assert with_slow["p99_ms"] < without["p99_ms"] + LIMIT / 2
    assert with_slow["growth"] < MOST_GROWTH
