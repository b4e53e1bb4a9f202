"""A request as the scheduler sees it: lengths, limits and what ends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

import numpy as np

from penstock.runtime.kv.keys import extend_keys

if TYPE_CHECKING:
    from penstock.runtime.schedule.groups import BeamGroup

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and the tokens it grows; positions count from 0, lengths are in tokens.

    The caller gives the first block of fields. `hears_all`: whether every token is news, or only the first and the end.
    `priority`: the lower, the sooner. `salt`: requests share KV only where it is the same. `controlled`: its logit rows
    need the controlled tail. `lockstep`: no step takes a token of it before the host knows its last sample. `scores`:
    every token of its prompt gives a logit row. `looks_back`: what it samples depends on the tokens of its slot, not on
    KV alone. `group`: whose beam it is. `source`: what an encoder reads first, where there is one; then `prompt` is
    what the decoder begins with. `forced_end`: its last token, where a limit ends it. `whole`: so many first tokens
    see each other, and one step computes them all. The second block follows from the first and is kept, because every
    step asks for it of every request. The scheduler alone changes the third; all else is derived. The host lags the
    device: `num_sampled` samples are launched, of which `output` are known.

    A request that is preempted gives its slot and blocks back and waits again: `goal` tokens, its prompt and what it
    had sampled, are computed anew before it goes on. One in lockstep has a goal one token further for each sample.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    max_seq_len: int
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    hears_all: bool = True
    priority: int = 0
    salt: bytes = b""
    controlled: bool = False
    lockstep: bool = False
    scores: bool = False
    looks_back: bool = False
    group: BeamGroup | None = None
    source: tuple[int, ...] = ()
    forced_end: int | None = None
    whole: int = 0

    prompt_length: int = field(init=False)
    output_limit: int = field(init=False)  # tokens it may sample: `max_tokens`, or less where `max_seq_len` ends it
    max_length: int = field(init=False)  # the longest that prompt and output may become
    end_ids: frozenset[int] = field(init=False)  # tokens that end it

    arrival: int = -1  # the how-manieth request of its scheduler
    slot: int | None = None
    goal: int = field(init=False)  # tokens to compute before it decodes, the last of which samples
    num_computed: int = 0
    num_reused: int = 0  # tokens whose KV was found at its first admission
    num_preemptions: int = 0
    output: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as worked out

    def __post_init__(self) -> None:
        self.goal = self.prompt_length = len(self.prompt)
        self.output_limit = min(self.max_tokens, self.max_seq_len - self.prompt_length)
        self.max_length = self.prompt_length + self.output_limit
        self.end_ids = self.stop_ids if self.ignore_eos else self.stop_ids | self.eos_ids

    @property
    def status(self) -> Status:
        if self.finish_reason is not None:
            return Status.FINISHED
        return Status.WAITING if self.slot is None else Status.RUNNING

    @property
    def given(self) -> tuple[int, ...]:
        """The tokens that the caller gave."""
        return self.source or self.prompt

    @property
    def members(self) -> tuple[Request, ...]:
        """Who comes and goes with it: the beams of its group, the first of which stands for all."""
        return (self,) if self.group is None else self.group.beams

    def in_prompt(self) -> bool:
        """Whether a part of the prompt (and of what is computed anew) is in no step yet."""
        return self.num_computed < self.goal

    @property
    def num_sampled(self) -> int:
        """Samples launched, known or not: the last token of the goal gives one, every token after it another."""
        return self.goal - self.prompt_length + max(0, self.num_computed - self.goal + 1)

    @property
    def num_unknown(self) -> int:
        """Samples launched that the host has not seen."""
        return self.num_sampled - len(self.output)

    @property
    def num_known(self) -> int:
        """Tokens that the host knows, prompt and output."""
        return self.prompt_length + len(self.output)

    @property
    def decodes(self) -> bool:
        """Whether the next step may take a token of it behind the goal: the last sample is never fed back."""
        return not self.lockstep and self.goal <= self.num_computed < self.max_length - 1

    @property
    def keeps_step(self) -> bool:
        """Whether it is in lockstep and only its last sample is left to compute: decoding, though with a goal."""
        return self.lockstep and bool(self.output) and self.num_computed == self.goal - 1

    @property
    def scoring(self) -> bool:
        """Whether the tokens it computes give logit rows each. Its first sample is known no sooner than all rows of its
        prompt; preempted before that, it scores all of the prompt again, and after that nothing."""
        return self.scores and not self.output

    def name_blocks(self, block_size: int) -> None:
        """Work out the keys of the full blocks of all that is known of it."""
        if len(self.keys) < self.num_known // block_size:
            extend_keys(self.keys, np.array([*self.prompt, *self.output], np.int32), block_size, self.salt)

    def rewind(self) -> None:
        """Start anew with all that is known: it has lost its slot and blocks."""
        assert self.finish_reason is None and self.num_known < self.max_length, f"request {self.id} is over"
        self.goal, self.num_computed, self.slot = self.num_known, 0, None
        self.num_preemptions += 1

    def launch(self, num_tokens: int) -> int:
        """Put the next `num_tokens` positions into a step; returns the first."""
        start = self.num_computed
        self.num_computed = start + num_tokens
        assert start < self.num_computed < self.max_length, f"request {self.id}: {num_tokens} more after {start}"
        return start

    def accept(self, token: int) -> FinishReason | None:
        """Learn the next sample; says whether it ends the request, and why."""
        output = self.output
        known = len(output)
        assert known <= self.num_computed - self.prompt_length, f"request {self.id} was told a token it did not sample"
        output.append(token)
        if token in self.end_ids:
            return "stop"
        if known + 1 != self.output_limit:
            return None
        if self.forced_end is not None:
            output[-1] = self.forced_end
        return "length"
