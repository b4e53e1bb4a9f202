"""Malformed bodies against the whole server with its real engine: each a 4xx, soon and short, and none does harm."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.serve.app import create_app
from penstock.serve.config import ServeConfig
from penstock.serve.openapi import document
from penstock.serve.routes import ROUTES
from penstock.serve.serving import Hooks
from penstock.serve.supervisor import Supervisor
from tests.cpu.serve.doubles import client_of
from tests.cpu.serve.malformed import GOOD, cases
from tests.long import results

FAILED: list[str] = []  # what was behind a status of 500
MOST_BYTES, MOST_SECONDS = 2500, 30.0


@asynccontextmanager
async def served(folder: Path, **config: Any) -> AsyncIterator[Any]:
    """A client of the whole server, in this process, and the engine in its own."""
    engine = {"model": None, "max_batch_size": 8, "max_seq_len": 512, "cache_dir": str(folder)}
    runner = Supervisor(engine, crash_dir=folder / "crashes")
    runner.start()
    try:
        await runner.ready()
        hooks = Hooks(failed=[lambda _, error: FAILED.append("".join(traceback.format_exception(error)))])
        app = create_app(ServeConfig(**config), runner.link, ROUTES, hooks, runner.healthy)
        async with client_of(app) as client:
            yield client
        app.serving.close()
    finally:
        await runner.stop()


async def refused(folder: Path, count: int, seed: int, hostile: bool) -> dict[str, Any]:
    """Send so many; what came back, by status, and how long the slowest took."""
    statuses: Counter[int] = Counter()
    slowest = 0.0, ""
    async with served(folder) as client:
        for number, case in enumerate(cases(document(ROUTES, False), count, seed, hostile)):
            started = time.monotonic()
            response = await asyncio.wait_for(client.post(case.path, content=case.body), MOST_SECONDS)
            slowest = max(slowest, (time.monotonic() - started, f"{case.path} {case.kind}"))
            told = case.path, case.kind, case.body[:200], response.status_code, response.text[:500], *FAILED
            assert 400 <= response.status_code < 500 or (case.may_pass and response.status_code == 200), told
            assert len(response.content) < MOST_BYTES, told
            if response.status_code != 200:
                assert response.json()["error"]["message"], told
            statuses[response.status_code] += 1
            if number % 50 == 49:
                for path in GOOD:
                    good = await client.post(path, content=json.dumps(GOOD[path]))
                    assert good.status_code == 200, (path, good.text, told)
        assert (await client.get("/health")).status_code == 200
    return {"cases": count, "statuses": dict(statuses), "slowest_seconds": slowest[0], "slowest": slowest[1]}


def test_five_hundred_malformed_bodies(tmp_path: Path) -> None:
    asyncio.run(refused(tmp_path, 500, 0, False))


@pytest.mark.long
def test_ten_thousand_malformed_bodies(tmp_path: Path) -> None:
    results.write("malformed_bodies", **asyncio.run(refused(tmp_path, 10_000, 1, True)))
