"""One streamed request to an OpenAI endpoint, with the time of all that comes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import msgspec
from msgspec import Struct

from penstock.bench.requests import Asked

PATHS: Final = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
MOST_DETAIL: Final = 200  # characters kept of what a server says of an error
WORDS: Final = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "hand", "family", "student", "group", "country", "problem", "part", "place", "case", "week", "system", "question",
    "work", "number", "night", "point", "home", "water", "room", "mother", "area", "money", "story", "month",
)  # fmt: skip


class Delta(Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class Choice(Struct, frozen=True):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def speaks(self) -> bool:
        """Whether it brings tokens; a finish may be all that is seen of one without text."""
        delta = self.delta
        said = delta and (delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)
        return bool(self.text or said)


class Usage(Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int | None = None


class Chunk(Struct, frozen=True):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_CHUNK: Final = msgspec.json.Decoder(Chunk)


@dataclass(frozen=True, slots=True)
class Target:
    """Where to and how. `url`: without /v1. `ids`: prompts go as token ids. `more`: further fields of the body."""

    url: str
    model: str
    endpoint: str = "completions"
    ids: bool = True
    api_key: str | None = None
    timeout: float = 600.0
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, asked: Asked) -> dict[str, Any]:
        common = {
            "model": self.model, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0,
        }  # fmt: skip
        if self.endpoint == "chat":
            said = {"messages": [{"role": "user", "content": words(asked)}], "max_completion_tokens": asked.new}
        else:
            prompt = list(asked.prompt) if self.ids and asked.text is None else words(asked)
            said = {"prompt": prompt, "max_tokens": asked.new}
        return {**common, **said, **self.more}


def words(asked: Asked) -> str:
    """A trace's own text; else a word for each id, which most tokenizers give one token."""
    return asked.text if asked.text is not None else " ".join(WORDS[i % len(WORDS)] for i in asked.prompt)


@dataclass(slots=True)
class Outcome:
    """Times in seconds from the start of the run. `stamps`: of each chunk with text. `counted`: whether the server said
    how many tokens there were; else each chunk counts as one. `error`: its kind, empty where all went well."""

    planned: float
    begun: float = 0.0
    ended: float = 0.0
    stamps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    counted: bool = False
    error: str = ""
    detail: str = ""

    def fail(self, kind: str, detail: object = "") -> None:
        self.error, self.detail = kind, " ".join(str(detail).split())[:MOST_DETAIL]

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.stamps[0] - self.begun

    @property
    def whole(self) -> float:
        return self.ended - self.begun

    @property
    def per_token(self) -> float | None:
        """Of those behind the first; None where there is but one."""
        more = self.output_tokens - 1
        return (self.stamps[-1] - self.stamps[0]) / more if more > 0 else None

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]


class _Broken(Exception):
    """What came is no answer; the arguments: kind and detail."""


async def ask(
    session: aiohttp.ClientSession, target: Target, asked: Asked, it: Outcome, start: float, over: Callable[[], None]
) -> None:
    """Fill an outcome; raises nothing of what a server may do. `over`: called when the request has left it."""
    it.begun = time.perf_counter() - start
    try:
        await _stream(session, target, asked, it, start)
    except _Broken as broken:
        it.fail(*broken.args)
    except TimeoutError:
        it.fail("timeout", f"no end after {target.timeout:g} s, {len(it.stamps)} chunks came")
    except aiohttp.ClientConnectorError as error:
        it.fail("no connection", error)
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, ConnectionError) as error:
        it.fail("cut off", error)
    except aiohttp.ClientError as error:
        it.fail("not HTTP", error)
    finally:
        it.ended = time.perf_counter() - start
        over()


async def _stream(session: aiohttp.ClientSession, target: Target, asked: Asked, it: Outcome, start: float) -> None:
    url = target.url + PATHS[target.endpoint]
    timeout = aiohttp.ClientTimeout(total=target.timeout)
    async with session.post(url, json=target.body(asked), headers=target.headers, timeout=timeout) as response:
        if response.status != 200:
            raise _Broken(f"HTTP {response.status}", (await response.content.read(2000)).decode(errors="replace"))
        if "event-stream" not in (found := response.headers.get("Content-Type", "no type")):
            raise _Broken("no stream", f"{found} instead of text/event-stream")
        finished = False
        async for at, data in _events(response.content):
            if data == b"[DONE]":
                break
            finished = _take(it, data, at - start) or finished
        else:
            if not finished:
                raise _Broken("cut off", f"the stream ended after {len(it.stamps)} chunks without a finish")
    if not it.stamps:
        raise _Broken("no text", "the stream ended without a token")
    if not it.counted:
        it.output_tokens = len(it.stamps)


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[float, bytes]]:
    """The data of each event, and when it was read."""
    rest = b""
    async for piece in content.iter_any():
        at = time.perf_counter()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at, line[5:].strip()
    if rest.startswith(b"data:"):
        yield time.perf_counter(), rest[5:].strip()


def _take(it: Outcome, data: bytes, at: float) -> bool:
    """Note a chunk; whether it ends a text."""
    try:
        chunk = _CHUNK.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _Broken("not JSON", f"{error}: {data[:80]!r}") from None
    if chunk.error:
        raise _Broken("error in the stream", chunk.error)
    if chunk.usage is not None and chunk.usage.completion_tokens is not None:
        it.prompt_tokens, it.output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        it.counted = True
    finished = any(choice.finish_reason for choice in chunk.choices)
    if any(choice.speaks for choice in chunk.choices) or (finished and not it.stamps):
        it.stamps.append(at)
    return finished


async def answers_to(session: aiohttp.ClientSession, target: Target, asked: Asked) -> Outcome:
    """One request, outside of any run."""
    it = Outcome(0.0)
    await ask(session, target, asked, it, time.perf_counter(), lambda: None)
    return it
