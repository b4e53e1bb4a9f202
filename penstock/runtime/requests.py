"""What goes into a request and what comes out: plain records, no tensors, no clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from penstock.errors import PenstockError
from penstock.runtime.sampling.params import SamplingParams
from penstock.runtime.schedule.request import FinishReason

__all__ = ["CompletionOutput", "LoRARequest", "RequestMetrics", "RequestOutput", "SamplingParams", "Sink"]


@dataclass(frozen=True)
class LoRARequest:
    """An adapter by the name it was loaded under; `path` loads it first if it is not loaded."""

    name: str
    path: str | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened to a request, in seconds on one monotonic clock; None: not yet. Filled by the executor.

    `admitted`: when its first tokens were launched. `reused_tokens`: of its prompt, whose KV was found.
    """

    arrival: float
    first_token: float | None = None
    finished: float | None = None
    admitted: float | None = None
    reused_tokens: int = 0
    preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds."""
        return _between(self.arrival, self.first_token)

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to admission."""
        return _between(self.arrival, self.admitted)

    @property
    def prefill_time(self) -> float | None:
        """Seconds from admission to the first token."""
        return _between(self.admitted, self.first_token)

    @property
    def decode_time(self) -> float | None:
        """Seconds from the first token to the end."""
        return _between(self.first_token, self.finished)

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the end."""
        return _between(self.arrival, self.finished)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(frozen=True)
class CompletionOutput:
    """One completion. `stop_reason` is the stop string or stop token id that ended it; None for the model's own end.

    logprobs, where asked for: of each token, {token id: log-probability}, itself first, then the likeliest.
    cumulative_logprob: the sum over the tokens, where it is known. score: of a beam search, which orders its outputs.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[Mapping[int, float], ...] | None = None
    cumulative_logprob: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """What a request has given so far; `prompt` is None where token ids came in.

    `notes`: the sampling parameters that were left open, what was taken for each, and from where; a line each.
    `prompt_logprobs`, where asked for: of each token of the prompt, as a completion's; None for the first, which
    nothing predicts.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    notes: tuple[str, ...] = ()
    prompt_logprobs: tuple[Mapping[int, float] | None, ...] | None = None


Sink = Callable[[RequestOutput | PenstockError], None]  # hears what becomes of a request
