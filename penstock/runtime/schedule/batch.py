"""What one step does: records handed from the scheduler to the executor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from penstock.runtime.kv.blocks import BlockRef
from penstock.runtime.kv.host import Restored, Saved
from penstock.runtime.kv.tables import Copy, Grown
from penstock.runtime.schedule.request import FinishReason, Request


class Row(NamedTuple):
    """`num_tokens` positions of one request from `start` on."""

    slot: int
    request_id: str
    start: int
    num_tokens: int
    samples: bool


class Chunk(NamedTuple):
    """The next `num_tokens` positions of a prompt, of which the last `num_logits` give logits: where it scores, all.

    Where they are the prompt's last ones it `samples`: by the last of its logit rows.
    """

    request: Request
    slot: int
    start: int
    num_tokens: int
    num_logits: int
    samples: bool

    def filled(self, block_size: int) -> tuple[int, list[bytes]]:
        """The first block that it fills, and the keys of all: they can be found from the next step on."""
        first, end = self.start // block_size, (self.start + self.num_tokens) // block_size
        return first, self.request.keys[first:end]


class Decoders:
    """The requests that take one token in each step, in order of admission, for as long as nobody joins or leaves.

    One object stands in plan after plan, so whatever follows from its requests is worked out once, not once a step.
    """

    def __init__(self, requests: Sequence[Request], block_size: int) -> None:
        """Each holds as many blocks as its tokens need so far."""
        self.requests = tuple(requests)
        self.slots = tuple([request.slot for request in requests if request.slot is not None])
        self.slot_set = frozenset(self.slots)
        self.controlled = any([request.controlled for request in requests])
        assert len(self.slot_set) == len(requests), f"{len(requests)} requests decode in slots {self.slots}"
        self.steps_left = min([r.max_length - 1 - r.num_computed for r in requests], default=0)
        self.starts = [request.num_computed for request in requests]
        self._context = sum(self.starts)
        self._rounds = 0
        self._block_size = block_size
        self._growing: dict[int, list[Request]] = {}  # by the round, of a block's worth, in which they need a block
        for request in requests:
            self._growing.setdefault(-request.num_computed % block_size, []).append(request)

    def growing(self) -> Sequence[Request]:
        """Those whose next token is the first of a block."""
        return self._growing.get(self._rounds % self._block_size, ())

    def advance(self) -> int:
        """Launch a token of each; returns how many steps went before."""
        assert self.steps_left > 0, "a request was at its limit"
        for request in self.requests:
            request.num_computed += 1
        self.steps_left -= 1
        self._rounds += 1
        return self._rounds - 1

    def rows(self, rounds: int) -> list[Row]:
        """The rows of the step before which so many had gone."""
        every = zip(self.slots, self.requests, self.starts, strict=True)
        return [Row(slot, request.id, start + rounds, 1, True) for slot, request, start in every]

    def context(self, rounds: int) -> int:
        """Positions before the tokens of the step before which so many had gone, of all requests together."""
        return self._context + rounds * len(self.requests)


class Admission(NamedTuple):
    """A request that enters `slot` with this step; of each group the blocks (their indices) of the tokens known of it,
    as far as it has them. The first `num_reused` tokens are in them already."""

    slot: int
    request: Request
    block_tables: tuple[tuple[int, ...], ...]
    num_reused: int = 0


class Fork(NamedTuple):
    """A slot goes on with another beam's text: `length` tokens of it in the blocks of `tables`, once `copies` are made.

    `request` knows all of the text, a token more; slot `parent` has had all but that token until now. `fresh`: the slot
    holds nothing of the group yet, of what an admission brings neither.
    """

    slot: int
    tables: tuple[tuple[int, ...], ...]
    length: int
    request: Request
    fresh: bool
    copies: tuple[Copy, ...]
    parent: int


@dataclass(frozen=True)
class StepPlan:
    """One ragged batch: decode rows first, then prompt chunks, each in order of admission.

    `rounds`: steps that went before with the same decoders. `grown`: blocks that their tables get with this step.
    `published`: blocks that others may read from the next step on, since this one fills them. `retabled`: slots whose
    table is replaced, before it gets what is `grown`. `saved`, then `restored`: blocks to copy to the host's memory and
    back, before all else; what is restored counts as `published`.
    """

    step_id: int
    decoders: Decoders
    rounds: int
    chunks: tuple[Chunk, ...] = ()
    admitted: tuple[Admission, ...] = ()
    grown: tuple[Grown, ...] = ()
    published: tuple[BlockRef, ...] = ()
    retabled: tuple[Fork, ...] = ()
    saved: tuple[Saved, ...] = ()
    restored: tuple[Restored, ...] = ()

    def __post_init__(self) -> None:
        if not self.chunks:
            assert self.decoders.requests and not self.admitted, "a step has rows, and who is admitted has one"
            return
        assert len(self._row_slots()) == self.num_rows, f"a slot has two rows: {self.rows}"
        assert min(chunk.num_tokens for chunk in self.chunks) >= 1, f"an empty row: {self.rows}"
        starts = {chunk.slot: chunk.start for chunk in self.chunks}
        for admission in self.admitted:
            assert starts.get(admission.slot) == admission.num_reused, (
                f"{admission} does not begin with its first token"
            )

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """One by one, for whoever looks at a plan; running a step does not need them."""
        prompts = [Row(c.slot, c.request.id, c.start, c.num_tokens, c.samples) for c in self.chunks]
        return (*self.decoders.rows(self.rounds), *prompts)

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """In row order."""
        return (*self.decoders.requests, *(chunk.request for chunk in self.chunks))

    @property
    def sampling(self) -> tuple[Request, ...]:
        """Who gets a token from this step, in row order."""
        return self._sampling if self.chunks else self.decoders.requests

    @cached_property
    def _sampling(self) -> tuple[Request, ...]:
        return (*self.decoders.requests, *(chunk.request for chunk in self.chunks if chunk.samples))

    @cached_property
    def sample_rows(self) -> Sequence[int]:
        """The logit row of each of `sampling`. Logit rows are in row order; a prompt may have several."""
        end = len(self.decoders.requests)
        if not self.chunks:
            return range(end)
        rows = list(range(end))
        for chunk in self.chunks:
            end += chunk.num_logits
            if chunk.samples:
                rows.append(end - 1)
        return rows

    @cached_property
    def slots(self) -> frozenset[int]:
        """Every slot this step reads or writes."""
        return self._row_slots().union(fork.slot for fork in self.retabled)

    def _row_slots(self) -> frozenset[int]:
        return self.decoders.slot_set.union(chunk.slot for chunk in self.chunks)

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Blocks to copy before the step; none is source and target."""
        return tuple(copy for fork in self.retabled for copy in fork.copies)

    @property
    def num_rows(self) -> int:
        """S."""
        return len(self.decoders.requests) + len(self.chunks)

    # Most steps have no chunks, and keeping such numbers would cost more than working them out.
    @property
    def num_tokens(self) -> int:
        """T."""
        count = len(self.decoders.requests)
        return count + sum([chunk.num_tokens for chunk in self.chunks]) if self.chunks else count

    @property
    def num_logits(self) -> int:
        """L."""
        count = len(self.decoders.requests)
        return count + sum([chunk.num_logits for chunk in self.chunks]) if self.chunks else count

    @property
    def work(self) -> tuple[int, int, list[tuple[int, int]], int]:
        """Rows that decode and their context in all, (tokens, context) of each chunk, logit rows."""
        chunks = [(chunk.num_tokens, chunk.start) for chunk in self.chunks]
        return len(self.decoders.requests), self.decoders.context(self.rounds), chunks, self.num_logits

    @property
    def controlled(self) -> bool:
        """Whether a logit row of it needs the controlled tail."""
        if self.decoders.controlled or not self.chunks:
            return self.decoders.controlled
        return any([c.num_logits and c.request.controlled for c in self.chunks])


class Event(NamedTuple):
    """News of one request: a token, its end, or both. `error` is what a failed step died of."""

    request_id: str
    token: int | None
    finish_reason: FinishReason | None
    error: Exception | None = None
