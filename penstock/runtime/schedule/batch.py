"""What one step does: records handed from the scheduler to the executor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from penstock.runtime.schedule.request import FinishReason, Request


class Row(NamedTuple):
    """`num_tokens` positions of one request from `start` on. A tuple, because a step of 512 rows makes 512 of them."""

    slot: int
    request_id: str
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True)
class Admission:
    """A request that enters `slot` with this step; its whole block table (block indices) is known already."""

    slot: int
    request: Request
    block_table: tuple[int, ...]


@dataclass(frozen=True)
class StepPlan:
    """One ragged batch: decode rows first, then prompt chunks, each in order of admission."""

    step_id: int
    rows: tuple[Row, ...]
    admitted: tuple[Admission, ...]

    def __post_init__(self) -> None:
        assert self.rows, "a step has rows"
        assert len(self.slots) == len(self.rows), f"a slot has two rows: {self.rows}"
        assert min(row.num_tokens for row in self.rows) >= 1, f"an empty row: {self.rows}"
        fresh = {row.slot for row in self.rows if not row.start}
        assert fresh == {admission.slot for admission in self.admitted}, "rows start at 0 exactly when admitted"

    @cached_property
    def slots(self) -> frozenset[int]:
        """Every slot this step reads or writes."""
        return frozenset(row.slot for row in self.rows)

    @cached_property
    def sampling_slots(self) -> tuple[int, ...]:
        """The slots that get a token from this step, in row order; the logit rows of the step."""
        return tuple(row.slot for row in self.rows if row.samples)

    @cached_property
    def num_tokens(self) -> int:
        """T."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_logits(self) -> int:
        """L."""
        return len(self.sampling_slots)


class Event(NamedTuple):
    """News of one request: a token, its end, or both. `error` is what a failed step died of."""

    request_id: str
    token: int | None
    finish_reason: FinishReason | None
    error: Exception | None = None
