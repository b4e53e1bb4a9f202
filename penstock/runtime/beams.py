"""The output of a beam search: its texts come at once, at its end."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.runtime.requests import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams
from penstock.runtime.schedule.beams import Hypothesis
from penstock.runtime.schedule.groups import BeamGroup
from penstock.runtime.schedule.request import FinishReason, Request
from penstock.text.detokenize import IncrementalDetokenizer
from penstock.text.tokenizer import Tokenizer


@dataclass
class BeamStream:
    """What the executor keeps for a search, as `Stream` for a text."""

    group: BeamGroup
    prompt: str | None
    params: SamplingParams
    arrival: float
    tokenizer: Tokenizer | None
    notes: tuple[str, ...] = ()
    index: int = 0
    admitted: float | None = None
    finished: float | None = None
    finish_reason: FinishReason | None = None

    @property
    def request(self) -> Request:
        return self.group.leader

    def admit(self, now: float) -> None:
        """Its prompt is in a step; again where it was preempted."""
        if self.admitted is None:
            self.admitted = now

    def end(self, reason: FinishReason, now: float) -> None:
        self.finish_reason, self.finished = reason, now

    def output(self) -> RequestOutput:
        """The n best; where the search was cut short, the best so far, of live beams too."""
        search, request = self.group.search, self.request
        found = list(search.finished)
        if not search.done:
            found += [
                Hypothesis(tokens, total, self.group.rules.score(total, len(tokens)), False)
                for tokens, total in search.live
                if tokens
            ]
            found.sort(key=lambda each: -each.score)
        texts = tuple(self._completion(i, each) for i, each in enumerate(found[: self.params.n]))
        none = (CompletionOutput(0, "", (), self.finish_reason),)
        times = self.arrival, self.finished if texts else None, self.finished, self.admitted
        metrics = RequestMetrics(*times, request.num_reused, request.num_preemptions)
        done = self.finish_reason is not None
        return RequestOutput(request.id, self.prompt, request.given, texts or none, done, metrics, self.notes)

    def _completion(self, index: int, found: Hypothesis) -> CompletionOutput:
        tokens, last = found.tokens, found.tokens[-1]
        shown = tokens[:-1] if found.stopped else tokens
        reason: FinishReason | None = "length" if self.group.search.done else self.finish_reason
        stop = last if found.stopped and last in self.request.stop_ids else None
        return CompletionOutput(
            index, self._text(shown), tokens, "stop" if found.stopped else reason, stop, None, found.total, found.score
        )

    def _text(self, tokens: tuple[int, ...]) -> str:
        """As it goes on behind the prompt."""
        if self.tokenizer is None or not self.params.detokenize:
            return ""
        skip = self.params.skip_special_tokens
        written = IncrementalDetokenizer(self.tokenizer, self.request.prompt, skip_special_tokens=skip)
        return "".join([*map(written.add, tokens), written.finish()])
