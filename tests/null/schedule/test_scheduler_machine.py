"""The scheduler under random arrivals, lengths, stops, aborts and failures, against a simulated device one step behind.

The device runs a step when it retires, the latest it could: it writes who owns each KV position and who sits in each
slot, and reads back everything a row attends to. A block or slot given away too early shows up as foreign contents.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.runtime.kv.blocks import DUMMY_BLOCK, BlockPool, KvManager
from penstock.runtime.schedule.batch import Event, StepPlan
from penstock.runtime.schedule.request import Request
from penstock.runtime.schedule.scheduler import Limits, Scheduler

EOS, BLOCK = 0, 4


@dataclass
class Truth:
    """What must happen to one request, kept apart from the scheduler's own state."""

    prompt: int
    limit: int
    stop_at: int | None  # the sample that is EOS
    taken: int = 0  # positions planned
    heard: int = 0  # tokens reported
    ends: list[str] = field(default_factory=list)

    @property
    def decoding(self) -> bool:
        return self.prompt <= self.taken < self.prompt + self.limit - 1

    @property
    def prompt_left(self) -> int:
        return max(0, self.prompt - self.taken)

    def token(self, sample: int) -> int:
        return EOS if sample == self.stop_at else sample + 1

    def end(self, sample: int) -> str | None:
        """Why the request ends with this sample, if it does."""
        if sample == self.stop_at:
            return "stop"
        return "length" if sample == self.limit - 1 else None


class Device:
    """Slots and KV contents; knows nothing of requests but what plans tell it."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.tokens: dict[int, int] = {}  # tokens known in each slot: the prompt and every sample so far
        self.cells: dict[tuple[int, int], tuple[str, int]] = {}

    def run(self, plan: StepPlan) -> None:
        for admission in plan.admitted:
            self.slots[admission.slot] = (admission.request.id, admission.block_table)
            self.tokens[admission.slot] = len(admission.request.prompt)
        for row in plan.rows:
            owner, table = self.slots[row.slot]
            assert owner == row.request_id, f"slot {row.slot} was given to {owner} under {row.request_id}"
            end = row.start + row.num_tokens
            assert end <= self.tokens[row.slot], "a row reads a token that is not sampled yet"
            assert end <= len(table) * BLOCK, "a row runs past its block table"
            for position in range(row.start, end):
                self.cells[table[position // BLOCK], position % BLOCK] = (owner, position)
            for position in range(end):
                assert self.cells[table[position // BLOCK], position % BLOCK] == (owner, position)
            self.tokens[row.slot] += row.samples


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        slots=st.integers(1, 4), spare=st.integers(0, 6), blocks=st.integers(4, 16), in_flight=st.integers(1, 2)
    )
    def start(self, slots: int, spare: int, blocks: int, in_flight: int) -> None:
        self.limits = Limits(slots, slots + spare, 32, in_flight)
        self.kv = KvManager(BlockPool(blocks, BLOCK))
        self.scheduler = Scheduler(self.limits, self.kv)
        self.device = Device()
        self.truths: dict[str, Truth] = {}
        self.queue: list[str] = []  # waiting, in order of arrival
        self.running: list[str] = []  # admitted and not ended, in order of admission
        self.flight: list[tuple[StepPlan, frozenset[int]]] = []  # with the blocks each plan may touch
        self.tables: dict[int, tuple[int, ...]] = {}

    @rule(prompt=st.integers(1, 24), max_tokens=st.integers(1, 12), stop_at=st.none() | st.integers(0, 6))
    def arrive(self, prompt: int, max_tokens: int, stop_at: int | None) -> None:
        limit = min(max_tokens, self.limits.max_seq_len - prompt)
        if not self.kv.fits_pool(prompt + limit):
            return
        name = f"r{len(self.truths)}"
        self.truths[name] = Truth(prompt, limit, stop_at)
        self.queue.append(name)
        self.scheduler.add(Request(name, (1,) * prompt, max_tokens, self.limits.max_seq_len, eos_ids=frozenset({EOS})))

    @precondition(lambda self: self.scheduler.can_schedule)
    @rule()
    def schedule(self) -> None:
        plan = self.scheduler.schedule()
        if plan is None:
            assert self.flight or not (self.queue or self.running), "work is left and nothing was planned"
            return
        self.check_admissions(plan)
        self.check_service(plan)
        for row in plan.rows:
            truth = self.truths[row.request_id]
            assert row.start == truth.taken
            truth.taken += row.num_tokens
            assert row.samples == (truth.taken >= truth.prompt)
            assert truth.taken < truth.prompt + truth.limit, "the last token allowed is never fed back"
        blocks = frozenset(block for slot in plan.slots for block in self.tables[slot])
        self.flight.append((plan, blocks))

    def check_admissions(self, plan: StepPlan) -> None:
        """In order of arrival, into slots and blocks that no step in flight may touch."""
        busy = {slot for earlier, _ in self.flight for slot in earlier.slots}
        written = {block for _, blocks in self.flight for block in blocks}
        for admission in plan.admitted:
            assert admission.slot not in busy and written.isdisjoint(admission.block_table)
            assert DUMMY_BLOCK not in admission.block_table
            assert self.queue.pop(0) == admission.request.id, "a later arrival overtook"
            self.running.append(admission.request.id)
            self.tables[admission.slot] = admission.block_table

    def check_service(self, plan: StepPlan) -> None:
        """Everyone decoding has a token; the rest goes to prompts in order, and no budget is left idle."""
        assert plan.num_tokens <= self.limits.max_num_tokens and len(plan.rows) <= self.limits.max_batch_size
        decoding = [name for name in self.running if self.truths[name].decoding]
        budget = self.limits.max_num_tokens - len(decoding)
        expected = [(name, 1) for name in decoding]
        for name in self.running:
            chunk = min(budget, self.truths[name].prompt_left)
            expected += [(name, chunk)] if chunk else []
            budget -= chunk
        assert [(row.request_id, row.num_tokens) for row in plan.rows] == expected
        if budget and self.queue:
            first = self.truths[self.queue[0]]
            full = len(self.kv.slots) == self.limits.max_batch_size
            assert full or not self.kv.fits_now(first.prompt + first.limit), "room for the oldest, and it waits"

    @precondition(lambda self: self.flight)
    @rule()
    def retire(self) -> None:
        plan, _ = self.flight.pop(0)
        self.device.run(plan)
        sampled = [row for row in plan.rows if row.samples]
        tokens = []
        for row in sampled:
            truth = self.truths[row.request_id]
            tokens.append(truth.token(row.start + row.num_tokens - truth.prompt))
        expected = [row.request_id for row in sampled if not self.truths[row.request_id].ends]
        events = self.scheduler.retire(plan.step_id, tokens)
        assert [event.request_id for event in events] == expected
        for event in events:
            truth = self.truths[event.request_id]
            assert event.token == truth.token(truth.heard) and event.finish_reason == truth.end(truth.heard)
            truth.heard += 1
            self.hear_end(event)

    def hear_end(self, event: Event) -> None:
        if event.finish_reason is None:
            return
        self.truths[event.request_id].ends.append(event.finish_reason)
        for names in (self.queue, self.running):
            if event.request_id in names:
                names.remove(event.request_id)

    @precondition(lambda self: self.truths)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.truths)[-6:]))
        event = self.scheduler.abort(name)
        assert (event is None) == bool(self.truths[name].ends)
        if event is not None:
            assert event == Event(name, None, "abort")
            self.hear_end(event)

    @precondition(lambda self: self.flight)
    @rule(newest=st.booleans())
    def fail(self, newest: bool) -> None:
        newest = newest and len(self.flight) > 1
        plan, _ = self.flight.pop(-1 if newest else 0)
        error = RuntimeError("the step died")
        if not newest:  # the newest failed to launch; an older one may have written all it was to write
            self.device.run(plan)
        expected = [row.request_id for row in plan.rows if not self.truths[row.request_id].ends]
        events = self.scheduler.fail(plan.step_id, error)
        assert events == tuple(Event(name, None, "error", error) for name in expected)
        for event in events:
            self.hear_end(event)

    @rule(steps=st.integers(1, 8))
    def run(self, steps: int) -> None:
        """The executor's own loop: keep the device one step ahead."""
        for _ in range(steps):
            if self.scheduler.can_schedule:
                self.schedule()
            if self.flight and not self.scheduler.can_schedule:
                self.retire()

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        assert (self.scheduler.num_waiting, self.scheduler.num_running) == (len(self.queue), len(self.running))
        tables = [block for slot in self.kv.slots for block in self.kv.table(slot)]
        assert len(tables) == len(set(tables)) == self.kv.pool.num_used
        for plan, blocks in self.flight:
            assert plan.slots <= self.kv.slots and blocks <= set(tables), "freed under a step in flight"
        assert all(len(truth.ends) <= 1 for truth in self.truths.values())

    def teardown(self) -> None:
        """Nothing starves: work left is done in a bounded number of steps, and then the pool is whole."""
        if not hasattr(self, "scheduler"):
            return
        left = [self.truths[name] for name in self.queue + self.running]
        bound = 4 + sum(truth.prompt + truth.limit + 2 for truth in left)
        for _ in range(bound):
            if not self.scheduler.has_work:
                break
            if self.scheduler.can_schedule:
                self.schedule()
            if self.flight:
                self.retire()
            self.books_balance()
        assert not self.scheduler.has_work and self.scheduler.schedule() is None
        assert all(len(truth.ends) == 1 for truth in self.truths.values())
        assert self.kv.pool.num_free == self.kv.pool.num_usable and self.kv.packing == 1.0


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
