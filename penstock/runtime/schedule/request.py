"""A request as the scheduler sees it: lengths, limits and what ends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One prompt and the tokens it grows; positions count from 0, lengths are in tokens.

    The caller gives the first block of fields; the scheduler alone changes the second; all else is derived. The host
    lags the device: `num_sampled` samples are launched, of which `output` are known.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    max_seq_len: int
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False

    slot: int | None = None
    num_computed: int = 0
    output: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def status(self) -> Status:
        if self.finish_reason is not None:
            return Status.FINISHED
        return Status.WAITING if self.slot is None else Status.RUNNING

    @cached_property
    def output_limit(self) -> int:
        """Tokens it may sample: `max_tokens`, or less where `max_seq_len` ends it first."""
        return min(self.max_tokens, self.max_seq_len - len(self.prompt))

    @cached_property
    def max_length(self) -> int:
        """The longest that prompt and output may become."""
        return len(self.prompt) + self.output_limit

    def in_prompt(self) -> bool:
        """Whether a part of the prompt is in no step yet."""
        return self.num_computed < len(self.prompt)

    @property
    def num_sampled(self) -> int:
        """Samples launched, known or not: the last prompt token gives the first, every token after it another."""
        return max(0, self.num_computed - len(self.prompt) + 1)

    @property
    def num_unknown(self) -> int:
        """Samples launched that the host has not seen."""
        return self.num_sampled - len(self.output)

    @property
    def num_wanted(self) -> int:
        """Tokens the next step could take: the rest of the prompt, or one, or none once the limit is launched."""
        if self.in_prompt():
            return len(self.prompt) - self.num_computed
        return int(self.num_computed < self.max_length - 1)  # the last sample is never fed back

    def launch(self, num_tokens: int) -> int:
        """Put the next `num_tokens` positions into a step; returns the first."""
        start = self.num_computed
        self.num_computed = start + num_tokens
        assert start < self.num_computed < self.max_length, f"request {self.id}: {num_tokens} more after {start}"
        return start

    def accept(self, token: int) -> FinishReason | None:
        """Learn the next sample; says whether it ends the request, and why."""
        assert self.num_unknown > 0, f"request {self.id} was told a token it did not sample"
        self.output.append(token)
        if token in self.stop_ids or (token in self.eos_ids and not self.ignore_eos):
            return "stop"
        return "length" if len(self.output) == self.output_limit else None
