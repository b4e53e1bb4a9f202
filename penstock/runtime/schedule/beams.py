"""Beam search as an algorithm: from the best continuations of each live beam to the next ones, and to the n best texts.

The rules are those of Hugging Face's `generate(num_beams=width, do_sample=False)`. In each round all continuations
compete by the sum of their tokens' log-probabilities. Of the best `width`, those that end become hypotheses, whose
score is the sum divided by the number of generated tokens (the end among them) to the power of `length_penalty`; the
best `width` hypotheses are kept. The best `width` continuations that do not end live on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Literal, NamedTuple

Candidate = tuple[int, float]  # a token and its log-probability


@dataclass(frozen=True, slots=True)
class BeamRules:
    """`early_stopping`: when no better hypothesis is expected, once there are `width`. True: at once. False: as soon
    as the best live beam, ended now, would be no better than the worst of them. "never": as soon as it would not even
    be at the greatest length (with a positive length penalty; otherwise as False).

    ahead: tokens before the first that the rules count as generated. forced_end: the last token of a text that has its
    greatest length, as good as certain.
    """

    width: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ahead: int = 0
    forced_end: int | None = None

    def score(self, total: float, length: int) -> float:
        return total / math.pow(length + self.ahead, self.length_penalty)


class Hypothesis(NamedTuple):
    """A finished text: its tokens with the end, the sum of their log-probabilities, and what it is ranked by."""

    tokens: tuple[int, ...]
    total: float
    score: float
    stopped: bool  # by a token that ends, not by its length


class Pick(NamedTuple):
    """A continuation that lives on: the rank of the beam it continues, the token, the sum up to there."""

    parent: int
    token: int
    total: float


class BeamSearch:
    """One search. `live`: tokens and sum of each live beam, the best first; at first there is one, without a token."""

    def __init__(self, rules: BeamRules, limit: int, end_ids: frozenset[int] = frozenset()) -> None:
        """`limit`: tokens that a text may have; `end_ids`: tokens that end one."""
        self.rules, self.limit, self.end_ids = rules, limit, end_ids
        self.live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        self.finished: list[Hypothesis] = []  # the best first
        self.done = False

    @property
    def num_candidates(self) -> int:
        """Of each beam, so many of its likeliest tokens decide: `width` are left if every end is among them."""
        return self.rules.width + max(self.rules.width, len(self.end_ids))

    @property
    def length(self) -> int:
        """Tokens of each live beam."""
        return len(self.live[0][0])

    def advance(self, candidates: Sequence[Sequence[Candidate]]) -> tuple[Pick, ...]:
        """A round: the likeliest tokens of each live beam, in the order of `live`. Who lives on, nobody once done.

        Of equal sums the earlier beam's, and of one beam's the earlier in its list, goes first.
        """
        assert len(candidates) == len(self.live) and not self.done
        width, last = self.rules.width, self.length + 1 == self.limit
        if last and self.rules.forced_end is not None:
            candidates = [[(self.rules.forced_end, 0.0)]] * len(candidates)
        every = [
            Pick(rank, token, self.live[rank][1] + logprob)
            for rank, tokens in enumerate(candidates)
            for token, logprob in tokens
        ]
        best = nsmallest(width + len(candidates) * len(self.end_ids), every, key=lambda pick: -pick.total)
        self._finish([pick for pick in best[:width] if last or pick.token in self.end_ids])
        picks = tuple([pick for pick in best if pick.token not in self.end_ids][:width])
        assert last or len(picks) == width, f"{len(picks)} of {width} beams live on: too few candidates"
        self.done = last or self._enough(picks[0].total)
        if self.done:
            return ()
        self.live = [((*self.live[pick.parent][0], pick.token), pick.total) for pick in picks]
        return picks

    def _finish(self, picks: Sequence[Pick]) -> None:
        new = []
        for parent, token, total in picks:
            score = self.rules.score(total, self.length + 1)
            new.append(Hypothesis((*self.live[parent][0], token), total, score, token in self.end_ids))
        self.finished = sorted([*self.finished, *new], key=lambda each: -each.score)[: self.rules.width]

    def _enough(self, best: float) -> bool:
        """Whether the search stops with the hypotheses it has; `best`: the sum of the best beam that lives on."""
        rules = self.rules
        if len(self.finished) < rules.width:
            return False
        hopeful = rules.early_stopping == "never" and rules.length_penalty > 0
        length = self.limit if hopeful else self.length + 1
        return rules.early_stopping is True or rules.score(best, length) <= self.finished[-1].score
