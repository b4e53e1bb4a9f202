"""Requests on their way into the executor, and what becomes of them on its way out."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any, Final

from penstock.errors import ExecutorError, PenstockError, SamplingError
from penstock.grammar.compiled import Compiled
from penstock.runtime.embedding import Pooled
from penstock.runtime.intake import Order, Submission
from penstock.runtime.loop import Loop
from penstock.runtime.requests import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams
from penstock.runtime.tokens import TokenStream
from penstock.serve.wire import Abort, Failed, Forget, Learn, Part, Submit, Times

_NAMES: Final = frozenset(each.name for each in fields(SamplingParams)) - {"stop", "detokenize"}
News = TokenStream | RequestOutput | Failed


class Desk:
    """`submit` and `abort` on one thread, `wait` on another; the executor's only takes note of what is new."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.closed = False  # behind the last `wait`
        self._news: queue.SimpleQueue[tuple[str, News] | None] = queue.SimpleQueue()
        self._grammars: dict[bytes, Compiled] = {}
        self._num_posted = self._num_taken = 0
        self._posted_at = time.monotonic()  # or when it began

    @property
    def busy(self) -> bool:
        return self._num_posted != self._num_taken or self._loop.executor.busy

    @property
    def moved_at(self) -> float:
        """When a step was read last, or work came to an idle engine, whether its thread has taken it or not."""
        return max(self._loop.executor.moved_at, self._posted_at)

    def submit(self, new: Submit) -> None:
        """Check a request here, and let the executor have it. What is wrong with it is its own news."""
        try:
            order = self._loop.executor.prepare(self._submission(new))
            if not self.busy:
                self._posted_at = time.monotonic()
            self._num_posted += 1
            self._loop.post(lambda: self._take(order), lambda error: self._fail(new.id, error))
        except Exception as error:  # the request's border
            self._fail(new.id, error)

    def learn(self, said: Learn | Forget) -> None:
        """The other process sees to it that these are not too many."""
        if isinstance(said, Learn):
            compiled = Compiled(said.body)
            self._grammars[compiled.key] = compiled
        else:
            self._grammars.pop(said.key, None)

    def abort(self, gone: Abort) -> None:
        executor = self._loop.executor
        self._loop.post(lambda: executor.abort(gone.id, index=gone.index), lambda error: self._fail(gone.id, error))

    def wait(self) -> tuple[list[Part], list[Failed]]:
        """All that is new, once there is something; a text's tokens since the last time are one part."""
        batch = [self._news.get()]
        while not self._news.empty():
            batch.append(self._news.get())
        news = [each for each in batch if each is not None]
        self.closed = len(news) < len(batch)
        failed = [each for _, each in news if isinstance(each, Failed)]
        return [part for id, each in news if not isinstance(each, Failed) for part in _parts(id, each)], failed

    def close(self) -> None:
        """Nothing is new from now on."""
        self._news.put(None)

    def _take(self, order: Order) -> None:
        self._num_taken += 1
        self._loop.executor.submit(order)

    def _submission(self, new: Submit) -> Submission:
        if unknown := new.params.keys() - _NAMES:
            raise SamplingError(f"unknown sampling parameter {min(unknown)[:80]!r}; see SamplingParams")
        params = SamplingParams(**new.params, detokenize=False)
        if new.embed:
            params = Pooled(self._loop.executor.engine).params
        return Submission(
            new.id, tuple(new.prompt), params, lambda news: self._hear_all(new.id, news), None, True, new.priority,
            new.cache_salt, new.queue_timeout, new.timeout, new.arrival, self._hear,
            None if new.grammar is None else self._known(new.grammar),
        )  # fmt: skip

    def _known(self, key: bytes) -> Compiled:
        if key not in self._grammars:
            raise ExecutorError(f"no grammar has the key {key[:32].hex()}; send it with Learn, ahead of its requests")
        return self._grammars[key]

    def _hear(self, text: TokenStream) -> None:
        if not text.noted:
            text.noted = True
            self._news.put((text.order_id, text))

    def _hear_all(self, id: str, news: RequestOutput | PenstockError) -> None:
        """A search as it ends, or a request's error."""
        if isinstance(news, PenstockError):
            self._fail(id, news)
        else:
            self._news.put((id, news))

    def _fail(self, id: str, error: Exception) -> None:
        known = isinstance(error, PenstockError)
        kind = type(error).__name__ if known else ExecutorError.__name__
        self._news.put((id, Failed(id, kind, str(error) if known else f"{type(error).__name__}: {error}")))


def _parts(id: str, news: TokenStream | RequestOutput) -> Iterable[Part]:
    """Of what was aborted there is none."""
    return _of_text(id, news) if isinstance(news, TokenStream) else _of_search(id, news)


def _of_text(id: str, text: TokenStream) -> Iterable[Part]:
    text.noted = False  # before the tokens are taken: what comes from now on is news again
    first, tokens, logprobs, ended = text.take()
    if not ended:
        if tokens and not first and logprobs is None:
            return (Part(id, text.index, tokens),)
        return (Part(id, text.index, tokens, logprobs=logprobs, **_at_first(text, first)),) if tokens else ()
    if text.finish_reason == "abort":
        return ()
    stop = text.stop_reason if isinstance(text.stop_reason, int) else None
    end = text.finish_reason, stop, text.ended_by_token
    rest = {**_at_first(text, first), "times": _times(text.metrics)}
    pooled = next((each for each in text.params.logits_processors if isinstance(each, Pooled)), None)
    if pooled is not None and (vector := pooled.vector) is not None:
        tokens, rest = [], {**rest, "vector": vector.astype("<f4").tobytes()}
    return (Part(id, text.index, tokens, *end, logprobs=logprobs, **rest),)


def _at_first(text: TokenStream, first: bool) -> dict[str, Any]:
    if not first:
        return {}
    asked = text.params.prompt_logprobs is not None and text.index == 0 and text.tokens
    found = text.prompt_logprobs if asked else None
    return {"notes": [*text.notes], "prompt_logprobs": found, "times": _times(text.metrics)}


def _of_search(id: str, found: RequestOutput) -> Iterable[Part]:
    """All at once."""
    if found.outputs[0].finish_reason != "abort":
        for each in found.outputs:
            yield _of_beam(id, each, found.metrics, [*found.notes])


def _of_beam(id: str, text: CompletionOutput, metrics: RequestMetrics, notes: list[str]) -> Part:
    stop = text.stop_reason if isinstance(text.stop_reason, int) else None
    return Part(
        id, text.index, [*text.token_ids], text.finish_reason, stop, text.finish_reason == "stop", notes=notes,
        times=_times(metrics), score=text.score, cumulative=text.cumulative_logprob,
    )  # fmt: skip


def _times(metrics: RequestMetrics) -> Times:
    return Times(**asdict(metrics))
