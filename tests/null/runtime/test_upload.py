"""Uploads against a plain reading of the plans: whatever the order of arrivals, the slots and rows are right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import PromptError
from penstock.ir.ops.state import FIELDS, HEADER, ROW, SlotLayout
from penstock.runtime.prompt import prompt_numbers
from penstock.runtime.schedule.batch import StepPlan
from penstock.runtime.schedule.beams import BeamRules
from penstock.runtime.schedule.groups import BeamGroup
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.request import Request
from penstock.runtime.schedule.scheduler import Scheduler
from penstock.runtime.upload import Encoder, Numbers, Source, slot_numbers
from tests.null.kv.books import mixed

SLOTS, TOKENS, LENGTH, BLOCK, FREQS = 4, 16, 64, 16, 3
LAYOUT = SlotLayout(SLOTS, LENGTH + 1, LENGTH // BLOCK, FREQS, tables=2)
SIZE = HEADER + ROW * SLOTS + 2 * (TOKENS + LENGTH + SLOTS * (len(FIELDS) + 2 * LAYOUT.table + FREQS + 2))


def source(request: Request) -> Source:
    """Numbers that name their request."""
    mark = int(request.id)
    given = {
        "temperature": 0.25 * mark,
        "top_k": mark,
        "top_p": 1 / (1 + mark),
        "min_p": 1 / (2 + mark),
        "seed": 1000 + mark,
    }
    fields = slot_numbers(given, [mark + i / 8 for i in range(FREQS)])
    return Source(np.array(request.prompt, np.int32), fields, np.array([7, mark], np.int32))


def slot_writes(slot: int, request: Request, length: int) -> dict[int, int]:
    """Fields, frequencies and controls of a slot that is filled anew."""
    mark = int(request.id)
    floats = np.array([0.25 * mark, 1 / (1 + mark), 1 / (2 + mark), *(mark + i / 8 for i in range(FREQS))], np.float32)
    bits = floats.view(np.int32).tolist()
    values = {"length": length, "temperature": bits[0], "top_p": bits[1], "top_k": mark, "seed": 1000 + mark}
    values["min_p"] = bits[2]
    writes = {LAYOUT.field(name) + slot: value for name, value in values.items()}
    writes |= {LAYOUT.freqs_at + slot * FREQS + i: bit for i, bit in enumerate(bits[3:])}
    return writes | {LAYOUT.controls_at + slot * LAYOUT.controls + i: number for i, number in enumerate((7, mark))}


def table_writes(slot: int, tables: Sequence[Sequence[int]]) -> dict[int, int]:
    assert len(tables) == LAYOUT.tables == 2
    starts = [LAYOUT.table_at + (group * SLOTS + slot) * LAYOUT.table for group in range(2)]
    return {start + i: b for start, table in zip(starts, tables, strict=True) for i, b in enumerate(table)}


def expected(plan: StepPlan) -> tuple[list[tuple[int, int, int]], dict[int, int]]:
    """Rows, and what is written where."""
    writes: dict[int, int] = {}
    for slot, at, block, group in plan.grown:
        writes[LAYOUT.table_of(slot, group) + at] = block
    for slot, request, tables, reused in plan.admitted:
        writes |= slot_writes(slot, request, reused)
        known = [*request.prompt, *request.output][:reused] if request.looks_back else []
        writes |= {LAYOUT.history_at + slot * LAYOUT.history + i: token for i, token in enumerate(known)}
        writes |= table_writes(slot, tables)
    for fork in plan.retabled:
        new = (
            slot_writes(fork.slot, fork.request, fork.length)
            if fork.fresh
            else {LAYOUT.field("length") + fork.slot: fork.length}
        )
        writes |= new | table_writes(fork.slot, fork.tables)
    for chunk in plan.chunks:
        known = [*chunk.request.prompt, *chunk.request.output]
        end = chunk.start + chunk.num_tokens + chunk.request.scoring
        for i, token in enumerate(known[chunk.start : end], chunk.start):
            writes[LAYOUT.history_at + chunk.slot * LAYOUT.history + i] = token
    rows = [(slot, 1, 1) for slot in plan.decoders.slots]
    return rows + [(chunk.slot, chunk.num_tokens, chunk.num_logits) for chunk in plan.chunks], writes


def check(upload: Numbers, plan: StepPlan) -> None:
    rows, writes = expected(plan)
    count = HEADER + ROW * len(rows)
    assert upload[:HEADER].tolist() == [len(rows), plan.num_tokens, plan.num_logits, len(writes)]
    assert [tuple(row) for row in upload[HEADER:count].reshape(-1, ROW).tolist()] == rows
    pairs = upload[count:].reshape(-1, 2).tolist()
    assert len(pairs) == len(writes) and dict(pairs) == writes


KINDS = st.sampled_from(("plain", "back", "back", "lockstep", "scores", "beams"))
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 40), st.integers(1, 20), KINDS), min_size=1, max_size=9
)
ABORTS = st.dictionaries(st.integers(0, 20), st.integers(0, 8), max_size=4)  # step -> whom


@given(ARRIVALS, ABORTS, st.integers(1, 2))
def test_every_upload_says_what_its_plan_says(
    arrivals: list[tuple[int, int, int, str]], aborts: dict[int, int], in_flight: int
) -> None:
    scheduler = Scheduler(Limits(SLOTS, TOKENS, LENGTH, in_flight), mixed((20, 10), BLOCK, (0, 18)))
    encoder, flight, step = Encoder(LAYOUT, SIZE), [], 0
    waiting = sorted((joins, i, *rest) for i, (joins, *rest) in enumerate(arrivals))
    while waiting or scheduler.has_work:
        while waiting and waiting[0][0] <= step:
            _, index, prompt, new, kind = waiting.pop(0)
            tokens = tuple(100 * index + i for i in range(prompt))
            tokens = tuple(t % 100 for t in tokens) if kind == "back" else tokens  # of one prefix
            flags = {"lockstep": kind == "lockstep", "scores": kind == "scores", "looks_back": kind == "back"}
            request = Request(str(index), tokens, new, LENGTH, frozenset({3}), **flags)
            if kind == "beams":
                scheduler.add(BeamGroup(request, BeamRules(3)).leader)
            else:
                scheduler.add(request)
        scheduler.abort(str(aborts.get(step)))
        if scheduler.can_schedule and (plan := scheduler.schedule()):
            check(encoder.encode(plan, source), plan)
            flight.append(plan)
        if flight and not (scheduler.can_schedule and scheduler.has_work and waiting):
            oldest = flight.pop(0)  # some end early, so that slots change hands
            tokens_of = [3 if (step + i) % 5 == 0 else 7 for i in range(len(oldest.sampling))]
            found = [[(4 + i, -0.1 * i - step % 3) for i in range(6)] for each in oldest.sampling if each.group]
            scheduler.retire(oldest.step_id, tokens_of, found)
        step += 1


def test_the_same_decoders_after_a_prompt_that_was_cancelled() -> None:
    scheduler = Scheduler(Limits(SLOTS, TOKENS, LENGTH, 1), mixed((20, 10), BLOCK, (0, 18)))
    encoder, decoders = Encoder(LAYOUT, SIZE), []

    def step() -> None:
        plan = scheduler.schedule()
        assert plan is not None
        decoders.append(plan.decoders)
        check(encoder.encode(plan, source), plan)
        scheduler.retire(plan.step_id, [7] * plan.num_logits)

    scheduler.add(Request("0", (5, 6), 20, LENGTH))
    for _ in range(3):
        step()
    scheduler.add(Request("1", tuple(range(40)), 4, LENGTH))  # three chunks
    step()
    scheduler.abort("1")
    step()
    assert decoders[1] is decoders[-1]


def test_a_step_of_the_same_decoders_is_the_upload_before_it_and_nothing_is_allocated() -> None:
    scheduler = Scheduler(Limits(SLOTS, TOKENS, LENGTH, 1), mixed((20, 10), BLOCK, (0, 18)))
    encoder = Encoder(LAYOUT, SIZE)
    for index in range(3):
        scheduler.add(Request(str(index), (5, 6), 9, LENGTH))
    uploads = []
    for _ in range(5):
        plan = scheduler.schedule()
        assert plan is not None
        uploads.append(encoder.encode(plan, source))
        check(uploads[-1], plan)
        scheduler.retire(plan.step_id, [7] * plan.num_logits)
    assert all(np.shares_memory(uploads[0], each) for each in uploads)
    assert all(each is uploads[1] for each in uploads[2:])


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ((), "empty"),
        ((1, 2, -1), "-1 at position 2 is outside the vocabulary of 300: ids go from 0 to 299"),
        ((1, 300), "300 at position 1"),
        ((1, 2**31 + 5), "2147483653 at position 1"),
        ((1, 2**80), "at position 1 is outside"),
        ((1, -(2**80)), "at position 1 is outside"),
        ((1, True, 2), "True at position 1 is a bool"),
        ((7, 1.0), "1.0 at position 1 is a float"),
        ((7, "8"), "'8' at position 1 is a str"),
        ((7, np.int64(8)), "at position 1 is a int64"),
    ],
)
def test_bad_ids_are_named(ids: tuple[int, ...], named: str) -> None:
    with pytest.raises(PromptError, match=named):
        prompt_numbers(ids, 300)


def test_good_ids_are_kept() -> None:
    assert prompt_numbers((0, 299, 5), 300).tolist() == [0, 299, 5]
    assert prompt_numbers([2**31 - 1], 2**31).dtype == np.int32
