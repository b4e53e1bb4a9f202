"""Who watches a request for text from its beginning to its end: metrics, logs, traces."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from starlette.datastructures import Headers

from penstock.runtime.sampling.params import SamplingParams
from penstock.serve.wire import Part


@dataclass(frozen=True)
class Started:
    """A request that goes to the engine. request_id: of the HTTP request; id: of the answer, which the engine's ids
    begin with. prompts: their lengths in tokens. arrival: on the monotonic clock."""

    request_id: str
    id: str
    route: str
    model: str
    prompts: tuple[int, ...]
    params: SamplingParams
    streamed: bool
    headers: Headers
    arrival: float = field(default_factory=time.monotonic)


class Ended(NamedTuple):
    """How it ended. finishes: of each text, as the engine's `Part.finish`, a stop string being "stop". error: what
    ended it instead; gone: the client left before."""

    prompt_tokens: int
    completion_tokens: int
    finishes: tuple[str, ...]
    error: Exception | None = None
    gone: bool = False


class Observer(Protocol):
    """Of one request. Its calls must neither raise nor wait."""

    def parts(self, parts: Sequence[Part]) -> None:
        """All that came of one prompt since the last time, as it comes."""
        ...

    def ended(self, end: Ended) -> None:
        """Once."""
        ...


class Observers:
    """Several as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def parts(self, parts: Sequence[Part]) -> None:
        for each in self._observers:
            each.parts(parts)

    def ended(self, end: Ended) -> None:
        for each in self._observers:
            each.ended(end)
