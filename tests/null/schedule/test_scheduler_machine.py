"""The scheduler under random arrivals, lengths, priorities, shared prefixes, stops, aborts and failures, against a
simulated device one step behind.

The device runs a step when it retires, the latest it could: it writes into each KV cell the whole text up to there, and
before a row runs it reads every cell that the row attends to. A block or slot given away too early, a prefix found that
is not there, or one that is another's, shows up as foreign contents. The pool may be too small for all, so requests are
preempted and computed anew, and must say the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.runtime.kv.blocks import DUMMY_BLOCK, BlockPool
from penstock.runtime.kv.manager import Fit, KvManager
from penstock.runtime.schedule.batch import Event, StepPlan
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.request import Request
from penstock.runtime.schedule.scheduler import Scheduler

EOS, BLOCK = 0, 4
Text = tuple[int, ...]


@dataclass
class Truth:
    """What must happen to one request, kept apart from the scheduler's own state."""

    prompt: Text
    salt: bytes
    limit: int
    stop_at: int | None  # the sample that is EOS
    mark: int  # what its samples are made of
    heard: int = 0  # tokens reported
    scored: int = 0  # tokens of its prompt whose logit rows have retired
    ends: list[str] = field(default_factory=list)

    def token(self, sample: int) -> int:
        return EOS if sample == self.stop_at else 1 + (self.mark + sample) % 3

    def text(self, length: int) -> Text:
        """Prompt and samples."""
        return (*self.prompt, *(self.token(i) for i in range(length - len(self.prompt))))[:length]

    def end(self, sample: int) -> str | None:
        """Why the request ends with this sample, if it does."""
        if sample == self.stop_at:
            return "stop"
        return "length" if sample == self.limit - 1 else None


class Device:
    """Slots and KV contents; knows nothing of requests but what plans tell it."""

    def __init__(self, truths: dict[str, Truth]) -> None:
        self.truths = truths
        self.slots: dict[int, str] = {}
        self.tables: dict[int, list[int]] = {}
        self.cells: dict[tuple[int, int], tuple[bytes, Text]] = {}
        self.dead: set[str] = set()  # failed: what their rows in flight read is nobody's concern

    def take_upload(self, plan: StepPlan) -> None:
        for slot, request, table, _ in plan.admitted:
            self.slots[slot], self.tables[slot] = request.id, list(table)
        for slot, index, block in plan.grown:
            assert index == len(self.tables[slot])
            self.tables[slot].append(block)

    def run(self, plan: StepPlan) -> None:
        self.take_upload(plan)
        for row in plan.rows:
            owner, table = self.slots[row.slot], self.tables[row.slot]
            assert owner == row.request_id, f"slot {row.slot} was given to {owner} under {row.request_id}"
            end, truth = row.start + row.num_tokens, self.truths[row.request_id]
            assert end <= len(table) * BLOCK, "a row runs past its block table"
            for position in range(row.start, end):
                self.cells[table[position // BLOCK], position % BLOCK] = (truth.salt, truth.text(position + 1))
            for position in range(end) if row.request_id not in self.dead else ():
                cell = self.cells[table[position // BLOCK], position % BLOCK]
                assert cell == (truth.salt, truth.text(position + 1)), "a cell holds another's text"


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        slots=st.integers(1, 4),
        spare=st.integers(0, 6),
        blocks=st.integers(4, 16),
        in_flight=st.integers(1, 2),
        reuse=st.booleans(),
        share=st.none() | st.integers(0, 3),
    )
    def start(self, slots: int, spare: int, blocks: int, in_flight: int, reuse: bool, share: int | None) -> None:
        self.limits = Limits(slots, slots + spare, 32, in_flight)
        self.kv = KvManager(BlockPool(blocks, BLOCK), reuse)
        self.share = share
        self.scheduler = Scheduler(self.limits, self.kv, None if share is None else lambda decoding: share)
        self.truths: dict[str, Truth] = {}
        self.requests: dict[str, Request] = {}
        self.device = Device(self.truths)
        self.flight: list[StepPlan] = []

    @rule(
        prompt=st.integers(1, 24),
        kind=st.integers(0, 2),
        max_tokens=st.integers(1, 12),
        stop_at=st.none() | st.integers(0, 6),
        priority=st.integers(0, 1),
        salt=st.sampled_from((b"", b"", b"other")),
        flags=st.sampled_from(((), (), ("lockstep",), ("scores",), ("controlled",), ("lockstep", "scores"))),
    )
    def arrive(
        self,
        prompt: int,
        kind: int,
        max_tokens: int,
        stop_at: int | None,
        priority: int,
        salt: bytes,
        flags: tuple[str, ...],
    ) -> None:
        limit = min(max_tokens, self.limits.max_seq_len - prompt)
        if not self.kv.fits_pool(prompt + limit):
            return
        name, count = f"r{len(self.truths)}", len(self.truths)
        text = (*(1 + kind,) * min(prompt, 13), *(1 + count % 3,) * 24)[:prompt]
        self.truths[name] = Truth(text, salt, limit, stop_at, kind)
        request = Request(
            name, text, max_tokens, self.limits.max_seq_len, eos_ids=frozenset({EOS}), priority=priority, salt=salt
        )
        for flag in flags:
            setattr(request, flag, True)
        self.requests[name] = request
        self.scheduler.add(request)

    @precondition(lambda self: self.scheduler.can_schedule)
    @rule()
    def schedule(self) -> None:
        waiting = {name for name, r in self.requests.items() if r.slot is None and not r.finish_reason}
        plan = self.scheduler.schedule()
        if plan is None:
            left = [name for name, r in self.requests.items() if not r.finish_reason]
            assert self.flight or not left, "work is left and nothing was planned"
            return
        self.check_admissions(plan, waiting)
        self.check_service(plan)
        self.flight.append(plan)

    def check_admissions(self, plan: StepPlan, waiting: set[str]) -> None:
        """Into slots that no step in flight may touch, and blocks of their own but for what is found."""
        busy = {slot for earlier in self.flight for slot in earlier.slots}
        for admission in plan.admitted:
            assert admission.slot not in busy and DUMMY_BLOCK not in admission.block_table
            assert admission.request.id in waiting
            own = admission.block_table[admission.num_reused // BLOCK :]
            others = {b for slot in self.kv.slots - {admission.slot} for b in self.kv.table(slot)}
            assert others.isdisjoint(own), "a block that is not full is shared"

    def check_service(self, plan: StepPlan) -> None:
        """Rows go on where they were, the budget holds, and prompts take what is left of it."""
        assert plan.num_tokens <= self.limits.max_num_tokens and len(plan.rows) <= self.limits.max_batch_size
        steady = [c for c in plan.chunks if c.request.lockstep and c.request.output and c.samples and c.num_tokens == 1]
        entered = {admission.slot for admission in plan.admitted}
        if (plan.decoders.requests or {c.slot for c in steady} - entered) and self.share is not None:
            assert sum(chunk.num_tokens for chunk in plan.chunks if chunk not in steady) <= max(1, self.share)
        self.check_logits(plan)
        for row in plan.rows:
            request, truth = self.requests[row.request_id], self.truths[row.request_id]
            assert row.samples == (row.start + row.num_tokens >= request.goal)
            end = row.start + row.num_tokens
            assert end < len(truth.prompt) + truth.limit, "the last token is never fed back"
            assert end <= len(truth.prompt) + truth.heard or not request.lockstep, "its last sample is not known"

    def check_logits(self, plan: StepPlan) -> None:
        """A row for each sample, and where a prompt scores for each token; room for them all."""
        assert plan.num_logits <= self.limits.max_batch_size
        rows: list[Request] = [*plan.decoders.requests]
        for chunk in plan.chunks:
            scoring = chunk.request.scores and not self.truths[chunk.request.id].heard
            assert chunk.num_logits == (chunk.num_tokens if scoring else int(chunk.samples))
            rows += [chunk.request] * chunk.num_logits
        assert plan.controlled == any(request.controlled for request in rows) and len(rows) == plan.num_logits
        assert [rows[at] for at in plan.sample_rows] == [*plan.sampling]
        assert all(at + 1 == len(rows) or rows[at + 1] is not rows[at] for at in plan.sample_rows)

    @precondition(lambda self: self.flight)
    @rule()
    def retire(self) -> None:
        plan = self.flight.pop(0)
        self.device.run(plan)
        self.take_scores(plan)
        sampled = [row for row in plan.rows if row.samples]
        tokens = []
        for row in sampled:
            truth = self.truths[row.request_id]
            tokens.append(truth.token(row.start + row.num_tokens - len(truth.prompt)))
        expected = [row.request_id for row in sampled if not self.truths[row.request_id].ends]
        events = self.scheduler.retire(plan.step_id, tokens)
        assert [event.request_id for event in events] == expected
        for event in events:
            truth = self.truths[event.request_id]
            assert event.token == truth.token(truth.heard) and event.finish_reason == truth.end(truth.heard)
            assert truth.scored == len(truth.prompt) or not self.requests[event.request_id].scores
            truth.heard += 1
            self.hear_end(event)

    def take_scores(self, plan: StepPlan) -> None:
        """Logit rows of prompts come in order and without a gap; after a preemption anew from the start."""
        for chunk in plan.chunks:
            truth = self.truths[chunk.request.id]
            if chunk.request.scores and not truth.heard and not truth.ends:
                assert chunk.start in (0, truth.scored)
                truth.scored = chunk.start + chunk.num_logits

    def hear_end(self, event: Event) -> None:
        if event.finish_reason is not None:
            self.truths[event.request_id].ends.append(event.finish_reason)

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
        """The newest failed to launch and has written nothing; an older one died after its upload, before it wrote KV.
        Later steps do not know that: those of their requests that build on it must end with it."""
        newest = newest and len(self.flight) > 1
        plan = self.flight.pop(-1 if newest else 0)
        if not newest:
            self.device.take_upload(plan)
        error = RuntimeError("the step died")
        unfinished = [row.request_id for row in plan.rows if not self.truths[row.request_id].ends]
        events = self.scheduler.fail(plan.step_id, error)
        ended = [event.request_id for event in events]
        assert ended[: len(unfinished)] == unfinished and all(event.error is error for event in events)
        for event in events:
            self.hear_end(event)
        self.device.dead.update(ended, [row.request_id for row in plan.rows])  # ghosts, too

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
        alive = [name for name, truth in self.truths.items() if not truth.ends]
        assert self.scheduler.num_waiting + self.scheduler.num_running == len(alive)
        for plan in self.flight:
            assert plan.slots <= self.kv.slots, "freed under a step in flight"
        assert all(len(truth.ends) <= 1 for truth in self.truths.values())
        assert 0 <= self.scheduler.waste() < 1

    def teardown(self) -> None:
        """Nothing starves: work left is done in a bounded number of steps, and then the pool is whole."""
        if not hasattr(self, "scheduler"):
            return
        left = [truth for truth in self.truths.values() if not truth.ends]
        bound = 8 + 4 * sum(len(truth.prompt) + truth.limit + 2 for truth in left) * (1 + len(left))
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
        assert self.kv.pool.num_used == 0 and self.scheduler.waste() == 0
        assert self.kv.fit((), 1) is Fit.YES


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
