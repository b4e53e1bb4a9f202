"""The HTTP process under load, before a simulated engine: a short form of tests/long/test_serve_load.py.

Other tests run beside it on the same cores, so what it asks of latencies is that the half of tokens is in time.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest

from tests.cpu.serve.crowd import Crowd, Server, Stream, load, request, silent, streams

STEP = 0.025
TEXTS = 128  # of the slow reader's request, so that it has more to read than sockets hold
LONG = {"n": TEXTS, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(STEP) as found:
        yield found


def wait_for_running(server: Server, count: int) -> None:
    end = time.monotonic() + 10
    while (found := server.health()["running"]) != count:
        assert time.monotonic() < end, f"{found} requests run, not {count}"
        time.sleep(0.05)


def test_a_crowd_gets_every_token_in_time() -> None:
    found = load(STEP, 80, 60)
    assert found["added_latency_ms"]["p50"] < 50
    assert found["tokens"] == 80 * 60


def read_on(slow: socket.socket) -> Stream:
    """To its end, as fast as it comes."""

    async def rest() -> Stream:
        loop = asyncio.get_running_loop()
        _, it = await loop.create_connection(lambda: Stream(Crowd(), b""), sock=slow)
        await asyncio.wait_for(it.over, 20)
        return it

    return asyncio.run(rest())


def test_a_slow_reader_holds_up_nobody_and_gets_all_of_its_own(server: Server) -> None:
    asyncio.run(streams(server.port, 20, 20))
    tokens = 160
    before = server.resident
    with silent(server.port, tokens, **LONG) as slow:
        beside = asyncio.run(streams(server.port, 20, tokens))
        assert not beside.broken and beside.p(50) < 50
        assert server.resident - before < 32 << 20
        slow.setblocking(False)
        it = read_on(slow)
    assert it.over.result() and it.tokens == TEXTS * tokens
    assert it.crowd.chunks < 0.8 * it.tokens, "what waited for it came together"
    wait_for_running(server, 0)


def test_who_leaves_without_reading_is_forgotten(server: Server) -> None:
    with silent(server.port, 60_000, n=TEXTS):
        wait_for_running(server, 1)
    wait_for_running(server, 0)


def test_broken_streams_are_seen(server: Server) -> None:
    """The crowd tells what came instead of its tokens."""

    async def one() -> Crowd:
        crowd, loop = Crowd(), asyncio.get_running_loop()
        text = request(5, "x", no_such_field=1)
        _, it = await loop.create_connection(lambda: Stream(crowd, text), "127.0.0.1", server.port)
        await it.over
        return crowd

    (said,) = asyncio.run(one()).broken
    assert "no_such_field" in said
