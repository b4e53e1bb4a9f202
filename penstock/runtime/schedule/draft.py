"""The prompts' part of a step while it is filled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.runtime.kv.manager import KvManager
from penstock.runtime.kv.tables import Grown
from penstock.runtime.schedule.batch import Admission, Chunk
from penstock.runtime.schedule.request import Request


@dataclass(slots=True)
class Draft:
    """`room`: tokens that the step may still take, `share` of them of prompts. `logits`: logit rows that are nobody's
    yet; each prompt under way has one, and so has whoever is admitted. `known`: tokens whose KV is found that may come
    with the step's upload. `spare`: blocks of each group that prompts leave to those who decode. `sources`: tokens that
    an encoder may still read before the step.
    """

    kv: KvManager

    room: int
    share: int
    logits: int
    known: int
    spare: int
    sources: int
    grown: list[Grown] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """Whether no prompt gets another token."""
        return min(self.room, self.share) <= 0

    def admit(self, admission: Admission) -> None:
        self.admitted.append(admission)
        if admission.request.looks_back:
            self.known -= admission.num_reused
        self.logits -= 1
        self.sources -= len(admission.request.source)
        self.give(admission.request)

    def fill(self, prompts: Iterable[Request]) -> None:
        """Prompts under way, as far as they fit."""
        for request in prompts:
            if request.in_prompt() and not request.keeps_step and not self.full:
                self.give(request)

    def length(self, request: Request, left: int) -> int:
        """Tokens that it would get of so many that are left of its prompt, with logits for one row of its own."""
        length = min(left, self.room, self.share)
        return min(length, 1 + self.logits) if request.scoring else length

    def give(self, request: Request) -> None:
        """As much of the request's prompt as fits: where blocks come chunk by chunk, as those free allow. That may be
        nothing while others decode, never of the oldest prompt alone: younger ones get what it has left over."""
        slot, left = request.slot, request.goal - request.num_computed
        length = self.length(request, left)
        assert slot is not None and length > 0 and (request.num_computed or length >= request.whole)
        if self.kv.slides:
            length = self.kv.reach(slot, request.num_computed + length, self.spare) - request.num_computed
            if length <= 0:
                return
            self.grown += self.kv.grow(slot, request.num_computed + length)
        samples = length == left
        num_logits = length if request.scoring else int(samples)
        self.chunks.append(Chunk(request, slot, request.launch(length), length, num_logits, samples))
        self.room -= length
        self.share -= length
        self.logits += 1 - num_logits
