"""Several texts of one prompt, which its caller gets as one output."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from penstock.errors import PenstockError
from penstock.runtime.requests import CompletionOutput, RequestMetrics, RequestOutput, Sink


class Several:
    """Joins the outputs of `width` texts; the caller's `sink` gets the `best` likeliest, or the first error."""

    def __init__(self, request_id: str, best: int, width: int, sink: Sink, streaming: bool) -> None:
        self._id, self._best, self._width, self._sink = request_id, best, width, sink
        self._streaming = streaming
        self._parts: dict[int, RequestOutput] = {}
        self._failed = False

    def sink(self, index: int) -> Sink:
        """Of the text of that number."""
        return partial(self._take, index)

    def _take(self, index: int, part: RequestOutput | PenstockError) -> None:
        if self._failed:
            return
        if isinstance(part, PenstockError):
            self._failed = True
            self._sink(part)
            return
        self._parts[index] = part
        finished = len(self._parts) == self._width and all(each.finished for each in self._parts.values())
        if finished or self._streaming:
            self._sink(self._joined(finished))

    def _joined(self, finished: bool) -> RequestOutput:
        parts = [self._parts[i] for i in sorted(self._parts)]
        completions = [part.outputs[0] for part in parts]
        if finished and self._best < self._width:
            completions.sort(key=lambda each: -_likelihood(each))
            completions = [replace(each, index=i) for i, each in enumerate(completions[: self._best])]
        metrics = _together([part.metrics for part in parts], finished)
        return replace(parts[0], request_id=self._id, outputs=tuple(completions), finished=finished, metrics=metrics)


def _likelihood(text: CompletionOutput) -> float:
    """One that was cut short before its first token is the last choice."""
    return text.cumulative_logprob if text.token_ids and text.cumulative_logprob is not None else -math.inf


def _together(metrics: list[RequestMetrics], finished: bool) -> RequestMetrics:
    """The first admission and first token of any, the last end once all have ended, sums of counts."""
    return RequestMetrics(
        metrics[0].arrival,
        _least(each.first_token for each in metrics),
        max((each.finished for each in metrics if each.finished is not None), default=None) if finished else None,
        _least(each.admitted for each in metrics),
        sum(each.reused_tokens for each in metrics),
        sum(each.preemptions for each in metrics),
    )


def _least(times: Iterable[float | None]) -> float | None:
    return min((time for time in times if time is not None), default=None)
