"""One text as token ids alone: whoever wants no text from the executor takes the new ones when it suits him."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from penstock.runtime.output import Stream
from penstock.runtime.schedule.request import FinishReason


class Taken(NamedTuple):
    """What came since the last time. first: no token was taken before. logprobs: of each token, where they were asked
    for or rank the texts. ended: nothing follows."""

    first: bool
    tokens: list[int]
    logprobs: list[dict[int, float]] | None
    ended: bool


@dataclass
class TokenStream(Stream):
    """`hear` is called on the executor's thread when there are new tokens, or the end: it should only take note, and
    may do so in `noted`. One other thread may `take` meanwhile: lists only grow, and the end is set last."""

    order_id: str = field(kw_only=True)
    hear: Callable[[TokenStream], None] = field(kw_only=True)
    noted: bool = field(default=False, init=False)
    tokens: list[int] = field(default_factory=list, init=False)
    _num_taken: int = field(default=0, init=False)
    _ended: bool = field(default=False, init=False)

    def add(self, token: int, now: float) -> bool:
        """Take the token that the request has just learnt; without text there is no stop string."""
        if self.first_token is None:
            self.first_token = now
        self.tokens.append(token)
        return False

    def end(self, reason: FinishReason, now: float) -> None:
        super().end(reason, now)
        self._ended = True

    def take(self) -> Taken:
        ended = self._ended  # before the tokens, which are complete if it is set
        start, end = self._num_taken, len(self.tokens)
        if not ended and end > start and self.tokens[end - 1] in self.request.end_ids:
            end -= 1  # the end is on its way, and says that this token has no text
        self._num_taken = end
        wanted = self.params.logprobs is not None or self.params.width > self.params.n
        return Taken(start == 0, self.tokens[start:end], self.logprobs[start:end] if wanted else None, ended)

    @property
    def ended_by_token(self) -> bool:
        """Whether the last token is one that ends texts, and has no text of its own."""
        return bool(self.tokens) and self.tokens[-1] in self.request.end_ids
