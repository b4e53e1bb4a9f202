"""Masks of grammars on a step's logits: a bit for each token of a row, applied where the logits are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from penstock.engine.program import SCORES
from penstock.ir.lazy import torch
from penstock.ir.ops.control import MOST_LOGPROBS

AT_ONCE: Final = 32  # rows, whose bits are spread out to bytes


@dataclass(frozen=True, slots=True)
class Masks:
    """Of the first of `bits`, i32[R,W], row by row: which of `rows` of the logits they are for, in rising order, and
    which of these want log-probabilities, which are of the logits as they were."""

    rows: Sequence[int]
    scored: Sequence[int]
    bits: Any


class Masker:
    """Applies masks on one device. Its buffers are allocated once, so that masking allocates nothing."""

    def __init__(self, device: str, rows: int, vocab_size: int) -> None:
        """For at most so many rows of that vocabulary."""
        words = -(-vocab_size // 32)
        # Filled by the host while no step is under way that may read it.
        self.bits = torch.zeros(rows, words, dtype=torch.int32, pin_memory=device == "cuda")
        self._bytes = torch.zeros(rows, 4 * words, dtype=torch.uint8, device=device)
        self._each = torch.zeros(AT_ONCE, 4 * words, 8, dtype=torch.uint8, device=device)
        self._unset = torch.zeros(AT_ONCE, 32 * words, dtype=torch.bool, device=device)
        self._powers = (1 << torch.arange(8)).to(torch.uint8).to(device)

    def apply(self, logits: Any, masks: Masks) -> Mapping[int, Any]:
        """Put minus infinity where a row's bit is not set; gives the scored rows as they were."""
        raw = {row: logits[row].clone() for row in masks.scored}
        count, columns = len(masks.rows), min(logits.shape[-1], self._unset.shape[1])
        self._bytes[:count].copy_(self.bits[:count].view(torch.uint8), non_blocking=True)
        for first, start, size in _runs(masks.rows):
            each, unset = self._each[:size], self._unset[:size]
            torch.bitwise_and(self._bytes[first : first + size, :, None], self._powers, out=each)
            torch.eq(each.view(size, -1), 0, out=unset)
            logits[start : start + size, :columns].masked_fill_(unset[:, :columns], -torch.inf)
            if columns < logits.shape[-1]:
                logits[start : start + size, columns:] = -torch.inf
        return raw

    def mend(self, results: Mapping[str, Any], raw: Mapping[int, Any]) -> None:
        """Of rows that were masked, the log-probabilities of what they were, as `ir.ops.control.logprobs` has them."""
        ids, values, own = (results[name] for name in SCORES)
        for row, logits in raw.items():
            ordered = torch.where(logits.isnan(), -torch.inf, logits.float())
            best = ordered.sort(descending=True, stable=True)
            total, most = ordered.logsumexp(-1), min(MOST_LOGPROBS, len(ordered))
            ids[row, :most], values[row, :most] = best.indices[:most].int(), best.values[:most] - total
            own[row] = ordered.gather(0, results["sampled"][row].long().view(1))[0] - total


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(index, row, how many) of those that follow each other, at most AT_ONCE."""
    first = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1 or end - first == AT_ONCE:
            yield first, rows[first], end - first
            first = end
