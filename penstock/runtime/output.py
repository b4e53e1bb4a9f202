"""One request's output as it grows: tokens to text, stop strings, and the records that callers get."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from penstock.runtime.requests import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams
from penstock.runtime.sampling.translate import num_logprobs
from penstock.runtime.schedule.request import FinishReason, Request
from penstock.runtime.step import Scores
from penstock.text.growth import Growth
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
    index: int = 0  # of its submission's texts
    text: str = ""
    logprobs: list[dict[int, float]] = field(default_factory=list)
    total: float = 0.0  # of its tokens' own
    prompt_logprobs: list[dict[int, float] | None] = field(default_factory=lambda: [None])
    admitted: float | None = None
    first_token: float | None = None
    finish_reason: FinishReason | None = None
    finished: float | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        params = self.params
        self._text = Growth(
            self.tokenizer, self.request.prompt, stops=params.stop_strings, include=params.include_stop_str_in_output,
            min_tokens=params.min_tokens, skip_special_tokens=params.skip_special_tokens,
        ) if params.detokenize and self.tokenizer else None  # fmt: skip
        self.is_scored = num_logprobs(self.params) > 0  # whether it keeps what tokens' log-probabilities are

    def score(self, token: int, scores: Scores, row: int) -> None:
        """Take the log-probabilities that a row of logits gave, before the token that was sampled from it."""
        request = self.request
        if request.forced_end is not None and len(request.output) + 1 == request.output_limit:
            token = token if token in request.end_ids else request.forced_end
            if token == request.forced_end:
                self.logprobs.append({token: 0.0})
                return
        self.logprobs.append(_by_token(token, scores, row, self.params.logprobs or 0))
        self.total += float(scores.chosen[row])

    def score_prompt(self, start: int, scores: Scores, rows: range) -> None:
        """Take those of the prompt's tokens behind positions `start` and following, which these rows predicted."""
        prompt, top = self.request.prompt, self.params.prompt_logprobs or 0
        del self.prompt_logprobs[start + 1 :]  # of a prompt that is computed anew
        for position, row in zip(range(start + 1, len(prompt)), rows, strict=False):
            self.prompt_logprobs.append(_by_token(prompt[position], scores, row, top))

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
        self.text += self._text.add(token, silent=token in self.request.end_ids)
        return self._text.matched is not None

    def end(self, reason: FinishReason, now: float) -> None:
        """No token follows. A stop string, once complete, is why, whatever else ended with it."""
        self.finish_reason, self.finished = reason, now
        self.text += self._text.end() if self._text else ""
        if self._text is not None and self._text.matched is not None:
            self.finish_reason, self.stop_reason = "stop", self._text.matched
        elif reason == "stop" and (tokens := self.request.output) and tokens[-1] in self.request.stop_ids:
            self.stop_reason = tokens[-1]

    def output(self) -> RequestOutput:
        """A snapshot."""
        tokens = tuple(self.request.output)
        completion = CompletionOutput(self.index, self.text, tokens, self.finish_reason, self.stop_reason)
        if self.is_scored:
            wanted = tuple(self.logprobs) if self.params.logprobs is not None else None
            completion = replace(completion, logprobs=wanted, cumulative_logprob=self.total)
        asked = self.params.prompt_logprobs is not None
        of_prompt = tuple(self.prompt_logprobs) if asked else None
        done = self.finish_reason is not None
        prompt = (self.prompt, self.request.given)
        return RequestOutput(self.request.id, *prompt, (completion,), done, self.metrics, self.notes, of_prompt)

    @property
    def metrics(self) -> RequestMetrics:
        times = self.arrival, self.first_token, self.finished, self.admitted
        return RequestMetrics(*times, self.request.num_reused, self.request.num_preemptions)


def _by_token(token: int, scores: Scores, row: int, top: int) -> dict[int, float]:
    likeliest = zip(scores.top_ids[row, :top].tolist(), scores.top_values[row, :top].tolist(), strict=True)
    # A vocabulary of fewer tokens than were asked for gives -1 for the rest.
    return {token: float(scores.chosen[row])} | {other: value for other, value in likeliest if other not in (token, -1)}


def delta(before: RequestOutput | None, after: RequestOutput) -> RequestOutput:
    """What `after` adds to `before`: only the new text and tokens."""
    if before is None:
        return after
    old = {each.index: each for each in before.outputs}
    return replace(after, outputs=tuple(_behind(old.get(each.index), each) for each in after.outputs))


def _behind(old: CompletionOutput | None, new: CompletionOutput) -> CompletionOutput:
    if old is None:
        return new
    scores = None if new.logprobs is None else new.logprobs[len(old.logprobs or ()) :]
    return replace(new, text=new.text[len(old.text) :], token_ids=new.token_ids[len(old.token_ids) :], logprobs=scores)
