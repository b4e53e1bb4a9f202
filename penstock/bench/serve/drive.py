"""A run of requests against a server: each at its time, so many at once, while the client watches itself."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import aiohttp

from penstock.bench.requests import Asked
from penstock.bench.serve.ask import Outcome, Target, answers_to, ask
from penstock.bench.workload import VOCAB
from penstock.errors import OptionError, PenstockError

TICK: Final = 0.005  # seconds between two looks at the event loop
SPARE_FILES: Final = 64  # of this process, besides sockets
LEAST_VOCAB: Final = 100
PROBE: Final = (5, 4, 3)


class ServerError(PenstockError):
    """The server under load cannot be reached, or refuses what every request of the run would be."""


@dataclass(frozen=True)
class Run:
    """`seconds`: from the first request's start to the last one's end. `lags`: how late the client's event loop was,
    looked at every TICK; `cpu`: share of a core that the client's process took."""

    outcomes: tuple[Outcome, ...]
    seconds: float
    peak: int
    lags: tuple[float, ...]
    cpu: float


async def drive(session: aiohttp.ClientSession, target: Target, requests: Sequence[Asked], at_once: int | None) -> Run:
    """All requests, each at its arrival or, where `at_once` are under way, behind it."""
    crowd = Crowd(at_once or len(requests))
    outcomes = [Outcome(planned=each.arrival) for each in requests]
    async with _watched() as lags:
        start, cpu = time.perf_counter(), time.process_time()

        async def one(asked: Asked, it: Outcome) -> None:
            await asyncio.sleep(start + asked.arrival - time.perf_counter())
            await crowd.enter()
            await ask(session, target, asked, it, start, crowd.leave)

        await asyncio.gather(*(one(asked, it) for asked, it in zip(requests, outcomes, strict=True)))
        cpu = time.process_time() - cpu
    first, last = min(it.begun for it in outcomes), max(it.ended for it in outcomes)
    return Run(tuple(outcomes), last - first, crowd.peak, tuple(lags), cpu / (last - first))


class Crowd:
    """Requests under way: at most so many, and the most there were."""

    def __init__(self, most: int) -> None:
        self._room, self._now, self.peak = asyncio.Semaphore(most), 0, 0

    async def enter(self) -> None:
        await self._room.acquire()
        self._now += 1
        self.peak = max(self.peak, self._now)

    def leave(self) -> None:
        self._now -= 1
        self._room.release()


@asynccontextmanager
async def _watched() -> AsyncIterator[list[float]]:
    """How late the loop wakes who sleeps: what is read from a socket waits as long."""
    lags: list[float] = []

    async def watch() -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            lags.append(max(0.0, time.perf_counter() - due))

    watching = asyncio.ensure_future(watch())
    try:
        yield lags
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


@asynccontextmanager
async def connected(at_once: int) -> AsyncIterator[aiohttp.ClientSession]:
    """Raises OptionError where this process may not open so many sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = at_once + SPARE_FILES
    if soft != resource.RLIM_INFINITY and need > soft:
        if hard != resource.RLIM_INFINITY and need > hard:
            raise OptionError(f"{at_once} connections exceed the {hard} files a process may open; give --concurrency")
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False) as session:
        yield session


async def served_model(session: aiohttp.ClientSession, target: Target) -> str:
    """The first that the server names. Raises ServerError."""
    found = await _json(session, target, "/v1/models")
    try:
        return str(found["data"][0]["id"])
    except (TypeError, KeyError, IndexError):
        raise ServerError(f"{target.url}/v1/models names no model; give --model") from None


async def about(session: aiohttp.ClientSession, target: Target) -> Any:
    """What /version says, where there is one."""
    with suppress(ServerError):
        return await _json(session, target, "/version")
    return None


async def _json(session: aiohttp.ClientSession, target: Target, path: str) -> Any:
    try:
        timeout = aiohttp.ClientTimeout(total=min(30.0, target.timeout))
        async with session.get(target.url + path, headers=target.headers, timeout=timeout) as response:
            body = await response.read()
            if response.status != 200:
                said = f"HTTP {response.status}: {body[:200].decode(errors='replace')}"
                raise ServerError(f"{target.url}{path}: {said}{_remedy(f'HTTP {response.status}')}")
            return json.loads(body)
    except (aiohttp.ClientError, ValueError, TimeoutError, OSError) as error:
        why = str(error) or type(error).__name__
        raise ServerError(f"{target.url}{path}: {why}; start the server, or mend --base_url") from None


def _remedy(error: str) -> str:
    return "; give a key of that server as --api_key" if error == "HTTP 401" else ""


async def settle(session: aiohttp.ClientSession, target: Target, say: Callable[[str], None]) -> tuple[Target, int]:
    """What form of prompt the server takes, and the largest token id. Raises ServerError where it takes none."""
    refused = ""
    vocab = VOCAB if target.endpoint == "completions" else 0
    while vocab >= LEAST_VOCAB:
        it = await answers_to(session, target, Asked([vocab, *PROBE], 1))
        if not it.error:
            return target, vocab
        refused = f"{it.error}: {it.detail}"
        if it.error != "HTTP 400":
            break
        vocab //= 2
    text = replace(target, ids=False)
    it = await answers_to(session, text, Asked(PROBE, 1))
    if it.error:
        raise ServerError(f"{target.url} does not answer a first request ({it.error}): {it.detail}{_remedy(it.error)}")
    if refused:
        say(f"prompts go as text, since token ids were refused: {refused}")
    return text, VOCAB
