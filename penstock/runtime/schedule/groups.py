"""The beams of one search: requests in lockstep, which share the blocks of what they have in common.

The first beam computes the prompt; the others wait in slots of their own, without blocks. A round is over when the
result of each live beam is known. The first continuation of a beam stays in its slot, further ones get the slots of
beams that have none; so whoever is copied from stays where it is, and no block is source and target at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from penstock.errors import OptionError
from penstock.runtime.kv.manager import KvManager
from penstock.runtime.kv.tables import Tables
from penstock.runtime.schedule.batch import Fork
from penstock.runtime.schedule.beams import BeamRules, BeamSearch, Candidate, Pick
from penstock.runtime.schedule.request import FinishReason, Request

MOST_BEAMS = 16  # the 2 * width likeliest tokens of each have to come back from the device


class BeamGroup:
    """`beams` have one id, the group's, and one prompt. What it found lies in `search.finished`."""

    def __init__(self, request: Request, rules: BeamRules) -> None:
        """`request` is the pattern of each beam. OptionError for a width that cannot be."""
        if not 1 <= rules.width <= MOST_BEAMS:
            raise OptionError(f"beam_width={rules.width} is out of range; give 1 to {MOST_BEAMS}")
        self.id, self.rules = request.id, rules
        self.beams = tuple([
            replace(request, lockstep=True, group=self, output=[], keys=[]) for _ in range(rules.width)
        ])  # fmt: skip
        self.restart()

    @property
    def leader(self) -> Request:
        """Who waits for all, and computes the prompt."""
        return self.beams[0]

    @property
    def finish_reason(self) -> FinishReason:
        """Why the best text ended."""
        return "stop" if self.search.finished[0].stopped else "length"

    def restart(self) -> None:
        """The search begins anew, with the prompt."""
        self.search = BeamSearch(self.rules, self.leader.output_limit, self.leader.end_ids)
        self._ranked = [self.leader]  # the live beams, the best first
        self._results: dict[int, Sequence[Candidate]] = {}  # by slot
        self._picks: tuple[Pick, ...] = ()

    def num_blocks(self, tables: Tables) -> int:
        """What it may hold at most: full blocks of the prompt are shared, where they stay."""
        size, length = tables.pool.block_size, self.leader.prompt_length
        shared = 0 if tables.window else tables.most(length - length % size)
        return shared + self.rules.width * (tables.most(self.leader.max_length) - shared)

    def num_spare(self, tables: Tables) -> int:
        """Blocks to leave it beside those of its prompt: for the first fork; all it may need once it was preempted, or
        it would come back at once, only to be preempted again."""
        if not self.leader.num_preemptions:
            return self.rules.width - 1
        return self.num_blocks(tables) - tables.most(self.leader.prompt_length)

    def num_copies(self, kv: KvManager) -> int:
        """Blocks of each group that the next fork takes: later ones take no more than they free."""
        partial = self.leader.num_computed % kv.block_size
        return self.rules.width - 1 if partial and len(self._ranked) == 1 else 0

    def take(self, request: Request, candidates: Sequence[Candidate]) -> bool:
        """A beam's result of this round. Whether the round is over: then the search is `done` or the group may fork."""
        assert request.slot is not None and request.slot not in self._results
        self._results[request.slot] = candidates
        if len(self._results) < len(self._ranked):
            return False
        self._picks = self.search.advance([self._results[beam.slot] for beam in self._ranked if beam.slot is not None])
        self._results = {}
        return True

    def fork(self, kv: KvManager) -> list[Fork]:
        """Hand the slots to the beams that live on. Afterwards each has one more token to compute."""
        parents = [self._ranked[pick.parent] for pick in self._picks]
        free = [beam for beam in self.beams if beam not in parents]
        for beam in free:
            assert beam.slot is not None
            kv.clear(beam.slot)
        ranked: list[Request] = []
        forks = []
        for parent in parents:
            if parent not in ranked:
                ranked.append(parent)
                continue
            child = free.pop(0)
            ranked.append(child)
            forks.append(_fork(kv, parent, child, fresh=len(self._ranked) == 1))
        self._follow(ranked)
        return forks

    def _follow(self, ranked: list[Request]) -> None:
        """Each beam's text is now the one of its rank."""
        length = self.leader.prompt_length + self.search.length
        for beam, (tokens, _) in zip(ranked, self.search.live, strict=True):
            beam.output = [*tokens]
            beam.goal, beam.num_computed = length, length - 1
        self._ranked, self._picks = ranked, ()


def _fork(kv: KvManager, parent: Request, child: Request, fresh: bool) -> Fork:
    length = parent.num_computed
    assert parent.slot is not None and child.slot is not None
    copies = kv.fork(parent.slot, child.slot, length)
    return Fork(child.slot, kv.tables(child.slot), length, child, fresh, copies, parent.slot)
