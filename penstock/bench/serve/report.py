"""What `penstock bench serve` does: find or start the server, run each workload against it, and tell."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import platform
import re
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from penstock.bench import plot
from penstock.bench.records import Maker, Record, commit, cpu, now
from penstock.bench.requests import Workload
from penstock.bench.serve.ask import PATHS, Target, answers_to
from penstock.bench.serve.drive import about, connected, drive, served_model, settle
from penstock.bench.serve.figures import Figures
from penstock.bench.serve.local import served
from penstock.errors import OptionError

Say = Callable[[str], None]
MOST_NOTE = 400  # characters of the further fields


@dataclass(frozen=True, slots=True)
class Wish:
    """`base_url`: None starts a server with `words` behind `penstock serve`. `at_once`: requests under way at most."""

    workloads: tuple[Workload, ...]
    base_url: str | None = None
    words: tuple[str, ...] = ()
    model: str | None = None
    endpoint: str = "completions"
    api_key: str | None = None
    at_once: int | None = None
    warmups: int = 1
    ignore_eos: bool = False
    goals: Mapping[str, float] = field(default_factory=dict)
    timeout: float = 600.0
    ready_timeout: float = 3600.0
    more: Mapping[str, Any] = field(default_factory=dict)
    picture: Path | None = None

    def check(self) -> None:
        """Raises OptionError, before anything starts."""
        if self.endpoint not in PATHS:
            raise OptionError(f"--endpoint {self.endpoint!r} is none of {', '.join(PATHS)}")
        for name, value, least in (("concurrency", self.at_once, 1), ("num_warmups", self.warmups, 0)):
            if value is not None and value < least:
                raise OptionError(f"--{name}={value} must be at least {least}")
        for name, seconds in (("timeout", self.timeout), ("ready_timeout", self.ready_timeout)):
            if not 0 < seconds < float("inf"):
                raise OptionError(f"--{name}={seconds} must be seconds above 0")
        if self.api_key and self.base_url is None:
            raise OptionError("--api_key is for the server of --base_url; one that is started here asks for none")
        if any(work.kind == "interrupted" for work in self.workloads):
            raise OptionError("--workload interrupted looks into the engine: `penstock bench throughput` has it")
        if self.base_url is not None and self.words:
            said = " ".join(word for word in self.words if word.startswith("--"))
            raise OptionError(f"{said}: of a server that is started here, and --base_url names one; leave them out")
        if self.picture:
            plot.require()


@dataclass(frozen=True)
class Told:
    """The same thrice; `good`: whether any request succeeded."""

    text: str
    data: dict[str, Any]
    records: list[Record]
    good: bool


def serve_report(wish: Wish, say: Say) -> Told:
    """Every workload in turn. Raises OptionError, and ServerError where no server answers."""
    wish.check()
    with _server(wish, say) as url:
        run = _runner(_all(wish, url, say))
    if wish.picture:
        plot.serving(run.figures, f"{run.model} at {url}", wish.picture)
    return _told(wish, url, run)


@dataclass(frozen=True)
class Ran:
    """`server`: what it said of itself, where it did."""

    model: str
    figures: list[Figures]
    form: str
    server: Any


async def _all(wish: Wish, url: str, say: Say) -> Ran:
    most = max(_at_once(wish, work) or work.most for work in wish.workloads)
    more = {**({"ignore_eos": True} if wish.ignore_eos else {}), **wish.more}
    async with connected(most) as session:
        target = Target(url, wish.model or "", wish.endpoint, True, wish.api_key, wish.timeout, more)
        if not target.model:
            target = replace(target, model=await served_model(session, target))
        target, vocab = await settle(session, target, say)
        figures = [await _one(session, wish, work, target, vocab, say) for work in wish.workloads]
        form = "text" if target.endpoint == "chat" or not target.ids else f"token ids up to {vocab}"
        return Ran(target.model, figures, form, await about(session, target))


async def _one(
    session: aiohttp.ClientSession, wish: Wish, work: Workload, target: Target, vocab: int, say: Say
) -> Figures:
    requests, at_once = work.requests(vocab, lambda text: ()), _at_once(wish, work)
    for _ in range(wish.warmups):
        if (it := await answers_to(session, target, requests[0])).error:
            say(f"a warm-up failed: {it.error}: {it.detail}")
    name = _name(wish, work, at_once)
    say(f"measuring {len(requests)} requests of {name}{f', at most {at_once} at once' if at_once else ''} ...")
    run = await drive(session, target, requests, at_once)
    return Figures(name, run, at_once, work.given.rate, wish.goals)


def _at_once(wish: Wish, work: Workload) -> int | None:
    return work.batch or wish.at_once


def _name(wish: Wish, work: Workload, at_once: int | None) -> str:
    """serve_512_128_c64, serve_chat_mixed_r10, serve_mixed_guided_json."""
    base = work.name.removeprefix("offline_").removeprefix("throughput_")
    chat = "chat_" if wish.endpoint == "chat" else ""
    rate = f"_r{work.given.rate:g}" if work.given.rate else ""
    more = "".join(f"_{re.sub('[^a-z0-9_]', '', name)}" for name in sorted(wish.more))
    return f"serve_{chat}{base}{rate}" + (f"_c{at_once}" if at_once else "") + more


@contextmanager
def _server(wish: Wish, say: Say) -> Iterator[str]:
    if wish.base_url is not None:
        yield _url(wish.base_url)
        return
    say("starting penstock serve ...")
    with served(wish.words, wish.ready_timeout) as url:
        say(f"ready at {url}")
        yield url


def _url(text: str) -> str:
    """Without /v1 at its end. Raises OptionError for what is no URL."""
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise OptionError(f"--base_url {text!r} is no URL like http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def _runner(work: Coroutine[Any, Any, Ran]) -> Ran:
    """On uvloop, where it is installed: it takes less of the client's time."""
    factory = __import__("uvloop").new_event_loop if importlib.util.find_spec("uvloop") else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


def environment(server: Any) -> dict[str, Any]:
    """Of the client, which knows of the server what that says itself."""
    return {
        "client": {
            "cpu": cpu(), "python": platform.python_version(), "aiohttp": aiohttp.__version__,
            "loop": "uvloop" if "uvloop" in sys.modules else "asyncio",
        },
        "server": server,
    }  # fmt: skip


def _told(wish: Wish, url: str, ran: Ran) -> Told:
    facts: dict[str, Any] = {"commit": commit(), "when": now(), "environment": environment(ran.server)}
    note = f"{ran.form}; {'ended by length alone' if wish.ignore_eos else 'texts may end early'}"
    note += f"; {json.dumps(wish.more)[:MOST_NOTE]}" if wish.more else ""
    figure = Maker(ran.model, "")
    records = [replace(r, **facts) for each in ran.figures for r in each.records(figure, note)]
    data = {
        "url": url, "model": ran.model, "endpoint": wish.endpoint, "prompts": ran.form,
        "runs": [each.to_json() for each in ran.figures], "records": [asdict(r) for r in records],
    }  # fmt: skip
    title = f"{ran.model} at {url}{PATHS[wish.endpoint]}, prompts as {ran.form}"
    return Told(
        "\n".join([title, *(each.text() for each in ran.figures)]),
        data,
        records,
        any(each.good for each in ran.figures),
    )
