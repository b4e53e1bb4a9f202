"""An engine that is none: what the frame of the server asks of one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from penstock import bundled
from penstock.errors import PenstockError
from penstock.grammar.compiled import Compiled
from penstock.serve.answers import answer
from penstock.serve.app import Application, create_app
from penstock.serve.body import Body, read_json
from penstock.serve.config import ServeConfig
from penstock.serve.link import EngineUnready, Reply, State
from penstock.serve.serving import Endpoint, Serving
from penstock.serve.wire import Beat, Submit

FACTS = {
    "model": "bundled", "directory": str(bundled.target()), "vocab_size": 4096, "max_seq_len": 512, "eos": [0],
    "max_batch_size": 8, "max_num_tokens": 256, "generation": {}, "dtype": "float32",
    "device": {"kind": "cpu", "name": "cpu"}, "version": "0.1.0", "embeds": False,
}  # fmt: skip


@dataclass
class StillEngine:
    """Has facts and a state, and takes no request."""

    state: State = "ready"
    facts: dict[str, Any] = field(default_factory=lambda: dict(FACTS))
    beat: Beat | None = None
    progress: tuple[str, int, int] = ("ready", 1, 1)
    restarts: int = 0

    def submit(self, new: Submit, grammar: Compiled | None = None) -> Reply:
        raise EngineUnready("this engine takes nothing", 3.0)


class Number(Body):
    number: float = Field(ge=0)
    words: list[str] = Field(default_factory=list, max_length=4)


async def echo(request: Request, serving: Serving) -> Response:
    return answer(await read_json(request, Number))


ECHO = Endpoint("POST", "/echo", echo, "Say it again.", Number, Number, (400,))


def raising(error: Exception) -> Endpoint:
    async def fail(request: Request, serving: Serving) -> Response:
        raise error

    return Endpoint("GET", "/fail", fail, "Raise it.")


def app_of(
    *routes: Endpoint, engine: StillEngine | None = None, well: tuple[bool, str] | None = None, **config: Any
) -> Application:
    return create_app(ServeConfig(**config), engine or StillEngine(), routes, None, well and (lambda now: well))


@asynccontextmanager
async def client_of(app: Callable[..., Any], **headers: str) -> Any:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://served", headers=headers) as client:
        yield client


class StillRunner:
    """Its engine becomes ready a while after the start, or never, with an error."""

    def __init__(self, opens_in: float = 0.0, fails: PenstockError | None = None) -> None:
        self.link = StillEngine(state="loading", facts={}, progress=("weights", 1, 2))
        self.error: PenstockError | None = None
        self.stopped = asyncio.Event()
        self._opens_in, self._fails = opens_in, fails

    def start(self) -> None:
        self._opening = asyncio.create_task(self._open())

    async def _open(self) -> None:
        await asyncio.sleep(self._opens_in)
        self.link.facts, self.error = dict(FACTS), self._fails
        self.link.state = "stopped" if self._fails else "ready"

    async def stop(self) -> None:
        self.stopped.set()

    def healthy(self, now: float) -> tuple[bool, str]:
        return self.link.state == "ready", f"the engine is {self.link.state}"
