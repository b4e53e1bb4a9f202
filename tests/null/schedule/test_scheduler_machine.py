"""The scheduler under random arrivals, lengths, priorities, shared prefixes, stops, aborts and failures, against a
simulated device one step behind.

The device runs a step when it retires, the latest it could: it writes into each KV cell the whole text up to there, and
before a row runs it reads every cell that the row attends to, all before it or those of a window. A block or slot given
away too early, a prefix found that is not there, or one that is another's, shows up as foreign contents. The pool may
be too small for all, so requests are preempted and computed anew, and must say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.errors import OptionError, PromptError
from penstock.runtime.kv.blocks import DUMMY_BLOCK
from penstock.runtime.kv.manager import Fit
from penstock.runtime.schedule.batch import Event, StepPlan
from penstock.runtime.schedule.beams import BeamRules, BeamSearch
from penstock.runtime.schedule.groups import BeamGroup
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.request import Request
from penstock.runtime.schedule.scheduler import Scheduler
from tests.null.kv.books import mixed

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
    rules: BeamRules | None = None

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


def likely(text: Text, count: int) -> list[tuple[int, float]]:
    """What follows a beam's text: a few tokens and their log-probabilities, which depend on all of it."""
    every = [(token, -(1 + hash((text, token)) % 97) / 16) for token in range(10)]
    return sorted(every, key=lambda each: -each[1])[:count]


def alone(truth: Truth) -> BeamSearch:
    """The search that a group is to carry out."""
    assert truth.rules is not None
    search = BeamSearch(truth.rules, truth.limit, frozenset({EOS}))
    while not search.done:
        search.advance([likely((*truth.prompt, *tokens), search.num_candidates) for tokens, _ in search.live])
    return search


class Device:
    """Slots and KV contents; knows nothing of requests but what plans tell it."""

    def __init__(self, truths: dict[str, Truth], windows: Sequence[int]) -> None:
        self.truths, self.windows = truths, windows
        self.slots: dict[int, str] = {}
        self.tables: dict[int, list[list[int]]] = {}  # by slot, of each group
        self.cells: dict[tuple[int, int, int], tuple[bytes, Text]] = {}  # by group, block and place
        self.host: dict[tuple[int, int], list[tuple[bytes, Text]]] = {}  # blocks of the host's memory, by group
        self.dead: set[str] = set()  # failed: what their rows in flight read is nobody's concern
        self.told: set[int | None] = set()  # slots that hold their group's parameters
        self.texts: dict[tuple[int, int], Text] = {}  # of a step's rows of beams, by slot

    def see(self, plan: StepPlan) -> None:
        """The texts that the plan's upload brings of beams: their requests may change before it runs."""
        for chunk in [chunk for chunk in plan.chunks if chunk.request.group]:
            known = (*chunk.request.prompt, *chunk.request.output)
            self.texts[plan.step_id, chunk.slot] = known[: chunk.start + chunk.num_tokens]
        for admission in plan.admitted:
            self.told -= {member.slot for member in admission.request.members[1:]}
            self.told.add(admission.slot)
        for fork in plan.retabled:
            assert fork.length + 1 == fork.request.num_known == fork.request.goal
            assert fork.fresh == (fork.slot not in self.told)
            self.told.add(fork.slot)

    def move(self, plan: StepPlan) -> None:
        """To the host's memory, then back."""
        hosts, targets = [each[1:] for each in plan.saved], [each[1:] for each in plan.restored]
        assert len(set(hosts)) == len(hosts) and len(set(targets)) == len(targets)
        for block, host, group in plan.saved:
            self.host[group, host] = [self.cells.get((group, block, at), (b"", ())) for at in range(BLOCK)]
        for host, block, group in plan.restored:
            self.cells |= {(group, block, at): cell for at, cell in enumerate(self.host.get((group, host), ()))}

    def copy(self, plan: StepPlan) -> None:
        sources = {(copy.source, copy.group) for copy in plan.copies}
        targets = [(copy.target, copy.group) for copy in plan.copies]
        assert sources.isdisjoint(targets) and len(set(targets)) == len(targets)
        for source, target, group in plan.copies:
            for at in range(BLOCK):
                self.cells[group, target, at] = self.cells.get((group, source, at), (b"", ()))

    def take_upload(self, plan: StepPlan) -> None:
        for fork in plan.retabled:
            self.slots[fork.slot], self.tables[fork.slot] = fork.request.id, [*map(list, fork.tables)]
        for slot, request, tables, _ in plan.admitted:
            self.slots[slot], self.tables[slot] = request.id, [*map(list, tables)]
        for slot, index, block, group in plan.grown:
            assert index == len(self.tables[slot][group])
            self.tables[slot][group].append(block)

    def run(self, plan: StepPlan) -> None:
        self.move(plan)
        self.copy(plan)
        self.take_upload(plan)
        for row in plan.rows:
            owner = self.slots[row.slot]
            assert owner == row.request_id, f"slot {row.slot} was given to {owner} under {row.request_id}"
            end, truth = row.start + row.num_tokens, self.truths[row.request_id]
            text = self.texts.get((plan.step_id, row.slot)) or truth.text(end)
            assert len(text) == end
            for group, (table, window) in enumerate(zip(self.tables[row.slot], self.windows, strict=True)):
                assert end <= len(table) * BLOCK, "a row runs past its block table"
                for position in range(row.start, end):
                    self.cells[group, table[position // BLOCK], position % BLOCK] = (truth.salt, text[: position + 1])
                lowest = max(0, row.start - window + 1) if window else 0
                for position in range(lowest, end) if row.request_id not in self.dead else ():
                    cell = self.cells[group, table[position // BLOCK], position % BLOCK]
                    assert cell == (truth.salt, text[: position + 1]), "a cell holds another's text"


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        slots=st.integers(1, 5),
        spare=st.integers(0, 6),
        blocks=st.tuples(st.integers(5, 12) | st.integers(4, 16), st.integers(2, 12)),
        in_flight=st.integers(1, 2),
        reuse=st.booleans(),
        share=st.none() | st.integers(0, 3),
        windows=st.tuples(st.just(0) | st.integers(1, 10), st.none() | st.integers(1, 10)),
        host=st.sampled_from((0, 1, 2, 4, 24)),
    )
    def start(
        self, slots: int, spare: int, blocks: tuple[int, int], in_flight: int, reuse: bool, share: int | None,
        windows: tuple[int, int | None], host: int,
    ) -> None:  # fmt: skip
        """One group of layers, or two."""
        seen = [window for window in windows if window is not None]
        self.limits = Limits(slots, slots + spare, 32, in_flight)
        self.kv = mixed(blocks[: len(seen)], BLOCK, seen, reuse, host)
        self.share = share
        self.scheduler = Scheduler(self.limits, self.kv, None if share is None else lambda decoding: share)
        self.truths: dict[str, Truth] = {}
        self.requests: dict[str, Request] = {}
        self.device = Device(self.truths, seen)
        self.flight: list[StepPlan] = []

    @rule(
        prompt=st.integers(1, 24) | st.integers(1, 5),
        kind=st.integers(0, 2),
        max_tokens=st.integers(1, 24),
        stop_at=st.none() | st.integers(0, 12),
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
        if not self.kv.fits_pools(prompt + limit):
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

    @rule(
        prompt=st.integers(1, 14),
        kind=st.integers(0, 2),
        max_tokens=st.integers(1, 16),
        width=st.integers(1, 4),
        penalty=st.sampled_from((-1.0, 0.0, 1.0)),
        early=st.sampled_from((False, True, "never")),
        priority=st.integers(0, 1),
    )
    def arrive_beams(
        self, prompt: int, kind: int, max_tokens: int, width: int, penalty: float, early: Any, priority: int
    ) -> None:
        name, text = f"r{len(self.truths)}", (1 + kind,) * prompt
        rules = BeamRules(width, penalty, early)
        eos = frozenset({EOS})
        group = BeamGroup(Request(name, text, max_tokens, self.limits.max_seq_len, eos, priority=priority), rules)
        try:
            self.scheduler.refuse_impossible(group.leader)
        except (OptionError, PromptError):
            return
        self.truths[name] = Truth(text, b"", group.leader.output_limit, None, kind, rules=rules)
        self.requests[name] = group.leader
        self.scheduler.add(group.leader)

    @precondition(lambda self: self.scheduler.can_schedule)
    @rule()
    def schedule(self) -> None:
        seated = {name: r.num_preemptions for name, r in self.requests.items() if r.slot is not None}
        plan = self.scheduler.schedule()
        if plan is None:
            left = [name for name, r in self.requests.items() if not r.finish_reason]
            assert self.flight or not left, "work is left and nothing was planned"
            return
        self.check_admissions(plan, seated)
        self.check_service(plan)
        self.check_writes(plan)
        self.check_window(plan)
        self.device.see(plan)
        self.flight.append(plan)

    def check_writes(self, plan: StepPlan) -> None:
        """Nobody writes what another may read, and a fork's slot is in no other step."""
        for row in plan.rows:
            for tables in self.kv.groups:
                for ref in tables.refs(row.slot)[row.start // BLOCK : -(-(row.start + row.num_tokens) // BLOCK)]:
                    assert tables.pool.holders(ref) == 1, "a block is shared and written"
        for earlier in self.flight:
            assert earlier.slots.isdisjoint(fork.slot for fork in plan.retabled)

    def check_window(self, plan: StepPlan) -> None:
        """What no row sees is given back, by the start of a block at the latest; what one sees is held, no more."""
        for tables, row in product(self.kv.groups, plan.rows):
            given = tables.num_blocks(row.slot) - len(tables.held(row.slot))
            unseen, before = (
                max(0, position - tables.window + 1) // BLOCK if tables.window else 0
                for position in (row.start, row.start - row.start % BLOCK)
            )
            assert before <= given <= unseen
            most = tables.window + row.num_tokens + 2 * BLOCK
            assert not tables.window or BLOCK * len(tables.held(row.slot)) <= most, "a chunk's blocks before their time"

    def check_admissions(self, plan: StepPlan, seated: dict[str, int]) -> None:
        """Into slots that no step in flight may touch, and blocks of their own but for what is found."""
        busy = {slot for earlier in self.flight for slot in earlier.slots}
        for admission in plan.admitted:
            assert admission.slot not in busy
            request = admission.request
            assert not request.finish_reason and seated.get(request.id) != request.num_preemptions
            for tables, table in zip(self.kv.groups, admission.block_tables, strict=True):
                assert DUMMY_BLOCK not in table[tables.first_seen(admission.num_reused) :]
                others = {ref.block for slot in self.kv.slots - {admission.slot} for ref in tables.held(slot)}
                assert others.isdisjoint(table[admission.num_reused // BLOCK :]), "a block that is not full is shared"

    def check_service(self, plan: StepPlan) -> None:
        """Rows go on where they were, the budget holds, and prompts take what is left of it."""
        assert plan.num_tokens <= self.limits.max_num_tokens and len(plan.rows) <= self.limits.max_batch_size
        steady = [c for c in plan.chunks if c.request.lockstep and c.request.output and c.samples and c.num_tokens == 1]
        entered = {admission.slot for admission in plan.admitted}
        if (plan.decoders.requests or {c.slot for c in steady} - entered) and self.share is not None:
            assert sum(chunk.num_tokens for chunk in plan.chunks if chunk not in steady) <= max(1, self.share)
        self.check_logits(plan)
        for row, request in zip(plan.rows, plan.requests, strict=True):
            truth = self.truths[row.request_id]
            assert row.samples == (row.start + row.num_tokens >= request.goal)
            end = row.start + row.num_tokens
            assert end < len(truth.prompt) + truth.limit, "the last token is never fed back"
            known = len(request.output) if request.group else truth.heard
            assert end <= len(truth.prompt) + known or not request.lockstep, "its last sample is not known"

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
        tokens, candidates = [], []
        for row, request in zip(sampled, plan.sampling, strict=True):
            truth = self.truths[row.request_id]
            if request.group:
                text = self.device.texts[plan.step_id, row.slot]
                candidates.append(likely(text, request.group.search.num_candidates))
            tokens.append(truth.token(row.start + row.num_tokens - len(truth.prompt)))
        expected = [r.id for r in plan.sampling if not (r.group or self.truths[r.id].ends)]
        events = self.scheduler.retire(plan.step_id, tokens, candidates)
        of_groups = [event for event in events if self.truths[event.request_id].rules]
        assert [event.request_id for event in events if event not in of_groups] == expected
        for event in of_groups:
            self.hear_group(event)
        for event in [event for event in events if event not in of_groups]:
            truth = self.truths[event.request_id]
            assert event.token == truth.token(truth.heard) and event.finish_reason == truth.end(truth.heard)
            assert truth.scored == len(truth.prompt) or not self.requests[event.request_id].scores
            truth.heard += 1
            self.hear_end(event)

    def hear_group(self, event: Event) -> None:
        truth, group = self.truths[event.request_id], self.requests[event.request_id].group
        assert group is not None
        search = alone(truth)
        reason = "stop" if search.finished[0].stopped else "length"
        assert event == Event(event.request_id, None, reason) and group.search.finished == search.finished
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
        rows = dict.fromkeys([row.request_id for row in plan.rows] + [fork.request.id for fork in plan.retabled])
        unfinished = [name for name in rows if not self.truths[name].ends]
        events = self.scheduler.fail(plan.step_id, error)
        ended = [event.request_id for event in events]
        assert ended[: len(unfinished)] == unfinished and all(event.error is error for event in events)
        for event in events:
            self.hear_end(event)
        self.device.dead.update(ended, rows, [name for name, truth in self.truths.items() if truth.ends])  # ghosts, too

    @rule(steps=st.integers(1, 20))
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
        tokens = sum(
            (len(truth.prompt) + truth.limit + 2) * (truth.rules.width if truth.rules else 1) for truth in left
        )
        bound = 8 + 4 * tokens * (1 + len(left))
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
        assert not any(tables.pool.num_used for tables in self.kv.groups) and self.scheduler.waste() == 0
        assert self.kv.fit((), 1) is Fit.YES


SchedulerMachine.TestCase.settings = settings(max_examples=400, stateful_step_count=60, deadline=None)
TestScheduler = SchedulerMachine.TestCase
