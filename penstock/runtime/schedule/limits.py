"""What bounds the scheduler, and what it counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penstock.errors import OptionError

# Tokens of prompts that a step with so many decoding rows may take.
PromptBudget = Callable[[int], int]


@dataclass(frozen=True)
class Limits:
    """Slots, tokens of one step, tokens of one sequence (prompt and output), steps planned ahead.

    max_num_queued_reqs, max_num_queued_tokens: requests that wait, and tokens of their prompts; None: no limit.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_steps_in_flight: int = 2
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None

    def __post_init__(self) -> None:
        least = {
            "max_batch_size": 1, "max_num_tokens": 1, "max_seq_len": 2, "max_steps_in_flight": 1,
            "max_num_queued_reqs": 1, "max_num_queued_tokens": 1,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise OptionError(f"{name}={value} is too small; it must be at least {low}")
        # With a token for every slot, every decoding request moves in every step and no prompt can be starved by them.
        if self.max_num_tokens < self.max_batch_size:
            raise OptionError(
                f"max_num_tokens={self.max_num_tokens} is less than max_batch_size={self.max_batch_size}: a step must "
                f"hold a token of every running request; raise the first or lower the second"
            )


@dataclass(slots=True)
class Counters:
    """Since the start. `reused_tokens` of `asked_tokens` of admitted prompts had their KV found."""

    generated_tokens: int = 0  # tokens learnt
    preemptions: int = 0
    asked_tokens: int = 0
    reused_tokens: int = 0
