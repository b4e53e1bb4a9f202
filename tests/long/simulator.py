"""The scheduler and its KV books under load for many steps, without a device: seeded, and quick enough for millions.

Requests come in bursts; lengths, priorities and shared prefixes are random; some are cancelled, some steps fail; pools
are tight, so that requests are preempted. After every step it is checked what is cheap to check, from what plans and
events say alone; the scheduler's own proof of its books is asked for now and then. What KV cells hold is not simulated:
tests/null/schedule/test_scheduler_machine.py does that.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from penstock.errors import PromptError, QueueFullError
from penstock.runtime.kv.blocks import DUMMY_BLOCK, BlockPool
from penstock.runtime.kv.manager import KvManager
from penstock.runtime.kv.tables import Tables
from penstock.runtime.schedule.batch import Event, StepPlan
from penstock.runtime.schedule.beams import BeamRules, Candidate
from penstock.runtime.schedule.groups import BeamGroup
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.queue import PATIENCE
from penstock.runtime.schedule.request import Request
from penstock.runtime.schedule.scheduler import Scheduler

EOS, TOKENS = 0, 1 << 14  # one sample in 200 ends a request; samples are drawn once and read round and round
PREFIXES = 6  # beginnings that prompts share


@dataclass(frozen=True)
class Setting:
    """What one simulation runs with. `load`: slots asked for, of those there are; `tight`: blocks, of what all slots
    could use; `burst`: requests that arrive at once, on average; `share`: of a step's tokens for prompts, or no target;
    `window`: of a second group of layers, 0: it sees all, None: there is none.
    """

    slots: int
    spare: int
    blocks: int
    block_size: int
    max_seq_len: int
    in_flight: int
    reuse: bool
    share: int | None
    load: float
    burst: float
    mean_prompt: float
    mean_output: float
    queue: int
    cancelled: float
    failures: float
    window: int | None

    @staticmethod
    def drawn(draw: random.Random) -> Setting:
        slots, block_size, length = draw.randint(2, 16), draw.choice((4, 8, 16)), 256
        whole = slots * -(-length // block_size)
        return Setting(
            slots, draw.randint(0, 64), 1 + max(length // block_size, int(whole * draw.choice((0.12, 0.2, 0.4, 1.0)))),
            block_size, length, draw.randint(1, 3), draw.random() < 0.75, draw.choice((None, None, 1, 16)),
            draw.choice((0.5, 0.9, 1.0, 1.5)), draw.choice((1.0, 3.0, 12.0)), draw.choice((12.0, 40.0)),
            draw.choice((24.0, 48.0, 96.0)), draw.randint(8, 48), 0.1, draw.choice((0.0, 1e-4, 1e-3)),
            draw.choice((None, None, 0, 10, 40)),
        )  # fmt: skip


@dataclass
class Found:
    """What happened, summed over simulations."""

    steps: int = 0
    requests: int = 0
    refused: int = 0
    preemptions: int = 0
    reused_tokens: int = 0
    evicted: int = 0
    restored: int = 0
    mixed: int = 0  # simulations with two groups of layers
    failed_steps: int = 0
    most_overtaken: int = 0  # admissions that the oldest of those waiting let pass, at most
    longest_wait: int = 0  # admissions between a request's arrival and its own, at most
    kinds: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)

    def facts(self) -> dict[str, Any]:
        return {**vars(self), "kinds": dict(self.kinds), "ends": dict(self.ends)}


def _books(setting: Setting, host_blocks: int) -> KvManager:
    """A pool with a window may be far smaller than the texts are long."""
    windows, size = [0, *([] if setting.window is None else [setting.window])], setting.block_size
    few = 2 + setting.slots // 2 + -(-(setting.window or setting.max_seq_len) // size)
    pools = [BlockPool(blocks, size, group) for group, blocks in enumerate((setting.blocks, few)[: len(windows)])]
    groups = [Tables(p, w, host_blocks=host_blocks) for p, w in zip(pools, windows, strict=True)]
    return KvManager(groups, setting.reuse)


class Simulation:
    """One scheduler, from empty to empty."""

    def __init__(self, setting: Setting, seed: int, found: Found) -> None:
        self.setting, self.draw, self.found = setting, random.Random(seed), found
        self.limits = Limits(
            setting.slots, setting.slots + setting.spare, setting.max_seq_len, setting.in_flight, setting.queue,
            int(setting.queue * setting.mean_prompt),
        )  # fmt: skip
        self.kv = _books(setting, host_blocks=seed % 3 * setting.blocks // 4)
        share = setting.share
        self.scheduler = Scheduler(self.limits, self.kv, None if share is None else lambda decoding: share)
        self.live: dict[str, Request] = {}
        self.flight: deque[StepPlan] = deque()
        self.tables: dict[int, list[list[int]]] = {}  # by slot, of each group, as plans told
        self.came: dict[str, int] = {}  # by request that has not been admitted, the admissions before it came
        self.admissions = self.count = self.at = 0
        self.oldest, self.overtaken = -1, 0
        self.samples = self.draw.choices((EOS, 5), (1, 200), k=TOKENS)
        self.prefixes = [tuple(self.draw.choices(range(1, 99), k=setting.max_seq_len)) for _ in range(PREFIXES)]

    def run(self, steps: int, check_every: int = 500) -> None:
        """So many steps with arrivals, then to the end of those that are left."""
        rate = self.setting.load * self.setting.slots / self.setting.mean_output / self.setting.burst
        planned, arrival = 0, 0.0
        while planned < steps:
            while arrival <= planned:
                self.arrive()
                arrival += self.draw.expovariate(rate)
            if self.step():
                planned += 1
                if planned % check_every == 0:
                    self.check()
            elif not self.flight:  # nothing to do before the next arrival
                arrival = planned
        bound = 64 + 4 * len(self.live) * self.setting.max_seq_len * (1 + len(self.live))
        while self.scheduler.has_work and bound:
            bound -= 1
            planned += self.step()
        self.finish(planned)

    def arrive(self) -> None:
        """A burst: one request and, as likely as not by its mean size, others with it."""
        self.submit()
        while self.draw.random() * self.setting.burst > 1.0:
            self.submit()

    def submit(self) -> None:
        setting, draw = self.setting, self.draw
        length = min(1 + int(draw.expovariate(1 / setting.mean_prompt)), setting.max_seq_len - 1)
        shared = draw.randrange(length + 1)
        prompt = draw.choice(self.prefixes)[:shared] + (1 + self.count % 97,) * (length - shared)
        output = 1 + int(draw.expovariate(1 / setting.mean_output))
        kind = draw.choices(("plain", "lockstep", "scores", "beams"), (90, 4, 3, 3))[0]
        priority = 1 if draw.random() < 0.8 else draw.randrange(3)
        self.count += 1
        request = Request(
            f"r{self.count}", prompt, output, setting.max_seq_len, frozenset({EOS}), hears_all=draw.random() < 0.5,
            priority=priority, lockstep=kind == "lockstep", scores=kind == "scores",
        )  # fmt: skip
        full = len(self.came) >= setting.queue
        try:
            request = self.queue(request, kind)
        except (QueueFullError, PromptError):  # the pool may be too small for all beams
            self.found.refused += 1
            return
        self.found.kinds[kind] += 1
        assert not full, "more wait than may"
        self.live[request.id] = request
        self.came[request.id] = self.admissions
        if draw.random() < setting.cancelled:
            self.cancel(draw.choice([*self.live]))

    def queue(self, request: Request, kind: str) -> Request:
        """Who stands for it."""
        if kind != "beams":
            self.scheduler.add(request)
            return request
        width = self.draw.randint(1, min(4, self.setting.slots))
        stopping = self.draw.choice((True, False, "never"))
        group = BeamGroup(request, BeamRules(width, self.draw.choice((0.0, 1.0)), stopping))
        self.scheduler.add(group.leader)
        return group.leader

    def cancel(self, name: str) -> None:
        event = self.scheduler.abort(name)
        assert event is not None and event.token is None, "a live request cannot be cancelled"
        self.hear(event)
        assert self.scheduler.abort(name) is None

    def step(self) -> bool:
        """Plan a step if one can be, and take the oldest that is due; whether one was planned."""
        scheduler, flight = self.scheduler, self.flight
        plan = scheduler.schedule() if scheduler.can_schedule else None
        if plan is not None:
            flight.append(plan)
            assert plan.num_tokens <= self.limits.max_num_tokens and plan.num_rows <= self.limits.max_batch_size
            if plan.grown or plan.admitted or plan.retabled:
                self.take_tables(plan)
        if flight and (plan is None or not scheduler.can_schedule):
            if self.setting.failures and self.draw.random() < self.setting.failures:
                self.fail()
            else:
                self.retire()
        return plan is not None

    def take_tables(self, plan: StepPlan) -> None:
        """Blocks of tables: nobody else's, but for what was found, and never the dummy."""
        for fork in plan.retabled:
            self.tables[fork.slot] = [*map(list, fork.tables)]
        sources = {(copy.group, copy.source) for copy in plan.copies}
        assert sources.isdisjoint((copy.group, copy.target) for copy in plan.copies)
        if plan.admitted:
            busy = [earlier.slots for earlier in self.flight if earlier is not plan]
            for admission in plan.admitted:
                for member in admission.request.members:  # beams that wait for their first fork have no blocks
                    self.tables.pop(-1 if member.slot is None else member.slot, None)
        for slot, request, tables, reused in plan.admitted:
            assert not any(slot in slots for slots in busy), "a slot that a step in flight touches"
            for group, table in zip(self.kv.groups, tables, strict=True):
                seen, first = table[group.first_seen(reused) :], reused // self.setting.block_size
                others = {ref.block for other in self.kv.slots - {slot} for ref in group.held(other)}
                assert len(set(seen)) == len(seen) and DUMMY_BLOCK not in seen and others.isdisjoint(table[first:])
            self.tables[slot] = [*map(list, tables)]
            self.see_admission(request)
        for slot, at, block, index in plan.grown:
            table_of = self.tables[slot][index]
            assert at == len(table_of) and block != DUMMY_BLOCK, "a table grows at its end"
            table_of.append(block)

    def see_admission(self, request: Request) -> None:
        """Nobody starves: the oldest that waits lets a bounded number pass."""
        self.admissions += 1
        came = self.came.pop(request.id, None)
        if came is not None:
            wait = self.admissions - 1 - came
            assert wait <= (self.setting.queue + 1) * (PATIENCE + self.setting.slots), f"{wait} were admitted before it"
            self.found.longest_wait = max(self.found.longest_wait, wait)
        waiting = [other.arrival for other in self.live.values() if other.slot is None]
        oldest = min(waiting, default=-1)
        # One that is older was preempted, and came back: until then this was not the oldest.
        later = -1 < oldest == self.oldest and request.arrival > oldest
        self.overtaken = self.overtaken + 1 if later else 0
        self.oldest = oldest
        assert self.overtaken <= PATIENCE + self.setting.slots, f"{self.overtaken} were admitted before the oldest"
        self.found.most_overtaken = max(self.found.most_overtaken, self.overtaken)

    def retire(self) -> None:
        plan = self.flight.popleft()
        count = len(plan.sampling)
        self.at = self.at + count if self.at + 2 * count < TOKENS else 0
        beams = [self.candidates(request.group) for request in plan.sampling if request.group is not None]
        for event in self.scheduler.retire(plan.step_id, self.samples[self.at : self.at + count], beams):
            if event.finish_reason is not None:
                self.hear(event)

    def candidates(self, group: BeamGroup) -> list[Candidate]:
        """Distinct tokens, the likeliest first; the end among them now and then."""
        first = self.draw.choices((EOS, 1), (1, 5))[0]
        return [(first + i, -0.1 * (i + self.draw.random())) for i in range(group.search.num_candidates)]

    def fail(self) -> None:
        """The oldest, or the newest, which was not launched."""
        plan = self.flight.pop() if self.draw.random() < 0.5 else self.flight.popleft()
        error = RuntimeError("the step died")
        events = self.scheduler.fail(plan.step_id, error)
        names = {event.request_id for event in events}
        assert all(request.id in names for request in plan.requests if request.id in self.live)
        for event in events:
            assert event.error is error
            self.hear(event)
        self.found.failed_steps += 1

    def hear(self, event: Event) -> None:
        """A request ends: once, and for a reason that its output bears out."""
        request = self.live.pop(event.request_id)
        reason = str(event.finish_reason)
        if request.group is not None:
            assert reason not in ("length", "stop") or request.group.search.finished
        elif reason == "length":
            assert len(request.output) == request.output_limit
        elif reason == "stop":
            assert request.output[-1] == EOS == event.token
        self.came.pop(event.request_id, None)
        self.found.ends[reason] += 1

    def check(self) -> None:
        """All books."""
        self.scheduler.check()
        assert self.scheduler.num_waiting + self.scheduler.num_running == len(self.live)
        none: list[list[int]] = [[] for _ in self.kv.groups]
        assert all(self.kv.tables(slot) == tuple(map(tuple, self.tables.get(slot, none))) for slot in self.kv.slots), (
            "tables are not as told"
        )
        assert all(plan.slots <= self.kv.slots for plan in self.flight), "freed under a step in flight"
        assert 0 <= self.scheduler.waste() < 1

    def finish(self, planned: int) -> None:
        pools = [tables.pool for tables in self.kv.groups]
        assert not self.scheduler.has_work and not self.live and not self.flight, "work is left, and nothing moves"
        self.check()
        assert all(pool.num_used == 0 and pool.num_free == pool.num_usable for pool in pools) and not self.kv.slots
        self.found.steps += planned
        self.found.requests += self.count
        self.found.preemptions += self.scheduler.counters.preemptions
        self.found.reused_tokens += self.scheduler.counters.reused_tokens
        self.found.evicted += self.kv.num_evicted
        self.found.restored += self.kv.num_restored
        self.found.mixed += len(pools) > 1


def simulate(seed: int, simulations: int, steps: int) -> Found:
    """Some simulations of so many steps each, all settings from one seed."""
    found, draw = Found(), random.Random(seed)
    for number in range(simulations):
        setting = Setting.drawn(draw)
        try:
            Simulation(setting, draw.getrandbits(32), found).run(steps)
        except AssertionError as error:
            raise AssertionError(f"simulation {number} of seed {seed}, {setting}: {error}") from error
    return found
