"""A step's upload: the rows of the batch, and every change to the slots, as one run of 32-bit numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.ir.ops.state import SlotLayout
from penstock.runtime.schedule.batch import Admission, Row, StepPlan

Numbers = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Sampler:
    """What a slot must know to sample for a request. `freqs`: rope frequencies where they are fixed by request."""

    temperature: float
    top_k: int
    top_p: float
    seed: int  # 31 bits
    freqs: tuple[float, ...] = ()


def encode(
    plan: StepPlan, layout: SlotLayout, samplers: Mapping[str, Sampler], prompts: Mapping[str, Sequence[int]]
) -> Numbers:
    """The upload of a plan, as `ir.ops.state.prepare` reads it. `samplers` and `prompts` are by request id."""
    writes = [*_admissions(plan.admitted, layout, samplers), *_prompt_tokens(plan.rows, layout, prompts)]
    index = np.concatenate([i for i, _ in writes]) if writes else np.empty(0, np.int32)
    value = np.concatenate([v for _, v in writes]) if writes else np.empty(0, np.int32)
    rows = np.array([(r.slot, r.num_tokens, r.samples) for r in plan.rows], np.int32)
    header = np.array([len(plan.rows), plan.num_tokens, plan.num_logits, len(index)], np.int32)
    return np.concatenate([header, rows.ravel(), np.stack([index, value], 1).ravel()])


def _admissions(
    admitted: Sequence[Admission], layout: SlotLayout, samplers: Mapping[str, Sampler]
) -> Iterator[tuple[Numbers, Numbers]]:
    for each in admitted:
        sampler, slot = samplers[each.request.id], each.slot
        floats = _bits((sampler.temperature, sampler.top_p))
        fields = {
            "length": 0,
            "temperature": floats[0],
            "top_k": sampler.top_k,
            "top_p": floats[1],
            "seed": sampler.seed,
        }
        yield _numbers([layout.field(f) + slot for f in fields]), _numbers(list(fields.values()))
        yield _span(layout.table_at + slot * layout.table, len(each.block_table)), _numbers(each.block_table)
        if layout.freqs:
            yield _span(layout.freqs_at + slot * layout.freqs, layout.freqs), _bits(sampler.freqs)


def _prompt_tokens(
    rows: Sequence[Row], layout: SlotLayout, prompts: Mapping[str, Sequence[int]]
) -> Iterator[tuple[Numbers, Numbers]]:
    """The prompt's share of each row; tokens behind it were sampled on the device and never left it."""
    for row in rows:
        tokens = prompts[row.request_id][row.start : row.start + row.num_tokens]
        if tokens:
            yield _span(layout.history_at + row.slot * layout.history + row.start, len(tokens)), _numbers(tokens)


def _numbers(values: Sequence[int]) -> Numbers:
    return np.asarray(values, np.int32)


def _bits(values: Sequence[float]) -> Numbers:
    return np.asarray(values, np.float32).view(np.int32)


def _span(start: int, count: int) -> Numbers:
    return np.arange(start, start + count, dtype=np.int32)
