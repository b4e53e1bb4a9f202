"""One request's output as it grows: tokens to text, stop strings, and the records that callers get."""

from __future__ import annotations

from dataclasses import dataclass, replace

from penstock.runtime.requests import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams
from penstock.runtime.schedule.request import FinishReason, Request
from penstock.text.detokenize import IncrementalDetokenizer, StopStrings
from penstock.text.tokenizer import Tokenizer


@dataclass
class Stream:
    """What the executor keeps for a request beside the scheduler's record."""

    request: Request
    prompt: str | None
    params: SamplingParams
    arrival: float
    tokenizer: Tokenizer | None
    notes: tuple[str, ...] = ()  # which sampling defaults were taken
    text: str = ""
    admitted: float | None = None
    first_token: float | None = None
    finish_reason: FinishReason | None = None
    finished: float | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        self._text = IncrementalDetokenizer(
            self.tokenizer, self.request.prompt, skip_special_tokens=self.params.skip_special_tokens
        ) if self.params.detokenize and self.tokenizer else None  # fmt: skip
        self._stops = StopStrings(self.params.stop_strings, include=self.params.include_stop_str_in_output)

    def admit(self, now: float) -> None:
        """Its first tokens are in a step; again where it was preempted."""
        if self.admitted is None:
            self.admitted = now

    def add(self, token: int, now: float) -> bool:
        """Take the token that the request has just learnt; True where a stop string is now complete.

        A token that ends the request gives no text.
        """
        if self.first_token is None:
            self.first_token = now
        if self._text is None:
            return False
        if token not in self.request.end_ids:
            self.text += self._stops.add(self._text.add(token))
        return self._stops.matched is not None

    def end(self, reason: FinishReason, now: float) -> None:
        """No token follows. A stop string, once complete, is why, whatever else ended with it."""
        self.finish_reason, self.finished = reason, now
        if self._text is not None and self._stops.matched is None:
            self.text += self._stops.add(self._text.finish())
            self.text += self._stops.finish()
        if self._stops.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.matched
        elif reason == "stop" and (tokens := self.request.output) and tokens[-1] in self.request.stop_ids:
            self.stop_reason = tokens[-1]

    def output(self) -> RequestOutput:
        """A snapshot."""
        completion = CompletionOutput(0, self.text, tuple(self.request.output), self.finish_reason, self.stop_reason)
        times = self.arrival, self.first_token, self.finished, self.admitted
        metrics = RequestMetrics(*times, self.request.num_reused, self.request.num_preemptions)
        done = self.finish_reason is not None
        prompt = (self.prompt, self.request.prompt)
        return RequestOutput(self.request.id, *prompt, (completion,), done, metrics, self.notes)


def delta(before: RequestOutput | None, after: RequestOutput) -> RequestOutput:
    """What `after` adds to `before`: only the new text and tokens."""
    if before is None:
        return after
    old, new = before.outputs[0], after.outputs[0]
    part = replace(new, text=new.text[len(old.text) :], token_ids=new.token_ids[len(old.token_ids) :])
    return replace(after, outputs=(part,))
