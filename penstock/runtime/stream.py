"""The text of one request, piece by piece."""

from __future__ import annotations

import queue
from contextlib import suppress
from typing import Any

from penstock.errors import PenstockError, SamplingError
from penstock.runtime.loop import Loop
from penstock.runtime.output import delta
from penstock.runtime.prompt import Prompt
from penstock.runtime.requests import RequestOutput, SamplingParams


class TextStream:
    """An iterator over the new text of one request; closing it early cancels the request."""

    def __init__(self, loop: Loop, submission: Any, prompt: Prompt, params: SamplingParams, *how: Any) -> None:
        self._parts: queue.SimpleQueue[RequestOutput | PenstockError] = queue.SimpleQueue()
        self._ended = True  # nothing follows: asking for more would wait for ever
        new = submission(prompt, params, self._parts.put, True, *how)
        if params.n > 1:
            raise SamplingError(f"n={params.n} texts make no stream of pieces; use generate_async, or generate")
        self._loop, self._id = loop, new.id
        self.output: RequestOutput | None = None  # the whole output so far
        loop.submit(new)
        self._ended = False

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        part = self._parts.get()
        self._ended = isinstance(part, PenstockError) or part.finished
        if isinstance(part, PenstockError):
            raise part
        new = delta(self.output, part).outputs
        self.output = part
        return new[0].text if new else ""  # a search that was cut short may have no text

    def close(self) -> None:
        """Cancel what is left."""
        self._loop.abort(self._id)

    def __del__(self) -> None:
        """A loop that was left early wants no more."""
        if not self._ended:
            loop, name = self._loop, self._id
            with suppress(PenstockError):  # the engine is gone, and the request with it
                loop.post(lambda: loop.executor.abort(name), lambda error: None)
