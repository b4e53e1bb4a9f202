"""Which tokens run in the next step: over slots, KV blocks and a token budget.

Pure: no clock, no tensors. Up to `max_steps_in_flight` steps are planned ahead of the tokens they sample. When step
n + 1 is planned, step n's tokens are unknown, only their number is. So a request that step n turns out to have ended
may still have a row in step n + 1: a ghost, whose token is dropped, and whose slot and blocks stay its own until no
step in flight touches them.

Running requests grow block by block. When there is none left, the one that came last (of the highest priority number)
is preempted: it gives up its slot and blocks and waits again, to be computed anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from penstock.errors import OptionError
from penstock.runtime.kv.manager import Fit, Found, KvManager
from penstock.runtime.kv.tables import Grown
from penstock.runtime.schedule.batch import Admission, Decoders, Event, StepPlan
from penstock.runtime.schedule.beams import Candidate
from penstock.runtime.schedule.draft import Draft
from penstock.runtime.schedule.groups import BeamGroup
from penstock.runtime.schedule.limits import Counters, Limits, PromptBudget
from penstock.runtime.schedule.losses import withdraw
from penstock.runtime.schedule.queue import WaitingQueue
from penstock.runtime.schedule.refusals import refuse_full, refuse_impossible
from penstock.runtime.schedule.request import FinishReason, Request, Status
from penstock.runtime.schedule.slots import Slots


class Scheduler:
    """Waiting requests, running ones in order of admission, and the steps in flight.

    The caller's loop: `schedule`, launch the plan, then `retire` (or `fail`) the oldest step in flight with its tokens.
    """

    def __init__(self, limits: Limits, kv: KvManager, prompt_budget: PromptBudget | None = None) -> None:
        """`prompt_budget`: where prompts shall not fill a step in which others decode; None: they may."""
        self.limits = limits
        self.kv = kv
        self.counters = Counters()
        self._prompt_budget = prompt_budget
        self._live: dict[str, Request] = {}  # not yet finished, by id
        self._waiting = WaitingQueue()
        self._slots = Slots(limits.max_batch_size)
        self._forking: dict[str, BeamGroup] = {}  # whose round is over, by id
        self._decoders: Decoders | None = None  # None: somebody has joined or left
        self._in_flight: dict[int, StepPlan] = {}
        self._next_step = 0
        self._arrivals = count()

    @property
    def has_work(self) -> bool:
        """Whether a step is left to plan or to retire."""
        return bool(self._waiting or self._slots.occupied)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._live) - len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def can_schedule(self) -> bool:
        """Whether another step may be planned before one retires."""
        return len(self._in_flight) < self.limits.max_steps_in_flight

    def add(self, request: Request) -> None:
        """Queue a request; nothing changes where it is refused.

        PromptError if it could never run, OptionError if its id is taken, QueueFullError if too many wait. The leader
        of a `BeamGroup` stands for all its beams: it has one event, the end, and `search.finished` is what was found.
        """
        assert request.status is Status.WAITING and not request.num_computed, f"request {request.id} was used before"
        assert request.max_tokens >= 1 and request.max_seq_len <= self.limits.max_seq_len, request
        if request.id in self._live:
            raise OptionError(f"request id {request.id!r} is taken by a request that has not finished; choose another")
        self.refuse_impossible(request)
        refuse_full(request, self._waiting, self.limits)
        self.name_blocks(request)
        request.arrival = next(self._arrivals)
        self._live[request.id] = request
        self._waiting.add(request)

    def refuse_impossible(self, request: Request) -> None:
        """PromptError or OptionError if it could never run. Reads nothing that changes, so that any thread may ask."""
        refuse_impossible(request, self.kv, self.limits)

    def name_blocks(self, request: Request) -> None:
        """Work out the keys of the full blocks of all that is known of a request. A new one's on any thread."""
        if self.kv.reuse:
            request.name_blocks(self.kv.block_size)

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None when nothing can run before a step in flight retires (or at all)."""
        assert self.can_schedule, f"{self.num_in_flight} steps are in flight, retire one first"
        for group in tuple(self._forking.values()):
            self._fork(group)
        self._slide(self._slots.prompts.values())
        decoders, grown = self._grow()
        draft = self._draft(len(decoders.requests))
        if not (decoders.requests or draft.chunks):
            assert self._in_flight or not self.has_work, "work is left and nothing can run"
            return None
        return self._plan(decoders, draft, (*grown, *draft.grown))

    def _draft(self, decoding: int) -> Draft:
        """Who keeps step, then prompts under way, in order of admission, then those that wait, as far as they fit."""
        room = self.limits.max_num_tokens - decoding
        logits = self.limits.max_batch_size - decoding - len(self._slots.prompts)
        known = max(self.limits.max_num_tokens, self.limits.max_seq_len)
        draft = Draft(self.kv, room, room, logits, known, decoding, self.limits.max_num_tokens)
        if not (self._slots.prompts or self._waiting):
            return draft
        for request in [r for r in self._slots.prompts.values() if r.keeps_step and not self._lacks_block(r)]:
            draft.give(request)
        draft.share = self._share(decoding + len(draft.chunks), draft.room)
        draft.fill(self._slots.prompts.values())
        self._admit(draft)
        return draft

    def _share(self, decoding: int, room: int) -> int:
        """Tokens of prompts that a step may take in which so many requests decode."""
        if decoding and self._prompt_budget is not None:
            return min(room, max(1, self._prompt_budget(decoding)))
        return room

    def _fork(self, group: BeamGroup) -> None:
        """Let a group go on whose round is over, as soon as there are blocks for its copies."""
        self._slide([beam for beam in group.beams if beam.slot not in self._slots.leaving])
        while self.kv.short_of(group.num_copies(self.kv), self._slots.leaving) and self._preempt():
            continue
        if group.id in self._forking and group.num_copies(self.kv) <= self.kv.num_free:
            del self._forking[group.id]
            self._slots.forked |= {fork.slot: fork for fork in group.fork(self.kv)}
            self._slots.prompts |= {beam.slot: beam for beam in group.beams if beam.slot is not None}

    def _gather(self, without: Sequence[Request] = ()) -> Decoders:
        """Who decodes from now on."""
        decoding = [r for r in self._slots.staying() if r.decodes and r not in without]
        self._slide(decoding)
        self._decoders = Decoders(decoding, self.kv.block_size)
        return self._decoders

    def _grow(self) -> tuple[Decoders, tuple[Grown, ...]]:
        """Who decodes in this step, and the blocks that are needed for it; somebody else's where there are too few."""
        decoders = self._decoders or self._gather()
        growing = self._growing(decoders)
        if not growing:
            return decoders, ()
        while self.kv.short_of(len(growing), self._slots.leaving) and self._preempt():
            decoders = self._decoders or self._gather()
            growing = self._growing(decoders)
        free = self.kv.num_free
        if late := growing[free:]:  # their blocks are not free before a step in flight retires
            decoders, growing = self._gather(without=late), growing[:free]
            self._decoders = None
        to = [(r.slot, r.num_computed + 1) for r in growing if r.slot is not None]
        return decoders, tuple([each for slot, length in to for each in self.kv.grow(slot, length)])

    def _growing(self, decoders: Decoders) -> Sequence[Request]:
        """Those whose next token is the first of a block."""
        self._slide(decoders.growing())  # now is soon enough: nobody holds more than when it gets a block
        return [*decoders.growing(), *filter(self._lacks_block, self._slots.prompts.values())]

    def _slide(self, requests: Iterable[Request]) -> None:
        """Give back the blocks that the next token of each does not see."""
        for request in requests if self.kv.slides else ():
            if request.slot is not None:
                self.kv.slide(request.slot, request.num_computed)

    def _lacks_block(self, request: Request) -> bool:
        """Whether one that keeps step has no block for its next token."""
        slot = request.slot
        return slot is not None and request.keeps_step and self.kv.lacks(slot, request.goal)

    def _preempt(self) -> bool:
        """Send the last of the running requests back to the queue; not the only one."""
        running = [r for r in self._slots.staying() if r is r.members[0]]
        if len(running) < 2:
            return False
        self._leave(max(running, key=lambda request: (request.priority, request.arrival)))
        self.counters.preemptions += 1
        self._release_idle()
        return True

    def _admit(self, draft: Draft) -> None:
        """Give waiting requests slots and blocks for all that is known of them, as far as the step has room.

        Running requests, and beams to come, are left a block each to grow by. Who waits for a prefix that another is
        computing is passed over; nobody else is, or a long request would starve. Where a request looks back, the tokens
        of what is found come with the upload, which has room for so many.
        """
        for request in tuple(self._waiting) if self._slots.num_free else ():
            if draft.full or not draft.logits or len(request.members) > self._slots.num_free:
                return
            if len(request.source) > draft.sources or draft.length(request, request.goal) < request.whole:
                return
            keys = self._shareable(request)
            found = self.kv.found(keys)
            reused = found.num * self.kv.block_size
            if request.looks_back and reused > draft.known:
                return
            spare, group = len(self._slots.occupied), request.group
            left = [spare + (group.num_spare(tables) if group else 0) for tables in self.kv.groups]
            asked = request.goal, left, found, draft.length(request, request.goal - reused), len(request.source)
            fit = self.kv.fit(keys, *asked)
            if fit is Fit.NO:
                return
            if fit is Fit.YES:
                draft.admit(self._enter(request, keys, asked))

    def _shareable(self, request: Request) -> list[bytes]:
        """Keys of the blocks that it may find: the last token is always computed, for it samples; to score, all are;
        and tokens that see each other are computed together."""
        return [] if request.scoring or request.whole else request.keys[: (request.goal - 1) // self.kv.block_size]

    def _enter(
        self, request: Request, keys: Sequence[bytes], asked: tuple[int, Sequence[int], Found, int, int]
    ) -> Admission:
        self._waiting.admit(request)
        slot = self._slots.seat(request)
        self._slots.prompts[slot] = request
        for beam in request.members[1:]:  # has nothing to do until it forks
            self.kv.admit(self._slots.seat(beam), (), 0)
            beam.goal = beam.num_computed = 0
        reused = self.kv.admit(slot, keys, *asked) * self.kv.block_size
        request.num_computed = reused
        if not request.num_preemptions:
            request.num_reused = reused
            self.counters.asked_tokens += request.goal
            self.counters.reused_tokens += reused
        return Admission(slot, request, self.kv.tables(slot), reused)

    def _plan(self, decoders: Decoders, draft: Draft, grown: tuple[Grown, ...]) -> StepPlan:
        rounds = decoders.advance() if decoders.requests else 0
        size = self.kv.block_size
        saved, restored, refs = self.kv.take_moves()
        published = *refs, *(ref for c in draft.chunks for ref in self.kv.publish(c.slot, *c.filled(size)))
        parts = tuple(draft.chunks), tuple(draft.admitted), grown, published, tuple(self._slots.forked.values())
        plan = StepPlan(self._next_step, decoders, rounds, *parts, saved, restored)
        self._slots.forked = {}
        for chunk in plan.chunks:
            if chunk.samples:  # its prompt is done: it decodes from the next step on
                del self._slots.prompts[chunk.slot]
                if chunk.request.decodes:
                    self._decoders = None
        if not decoders.steps_left:
            self._decoders = None
        self._in_flight[plan.step_id] = plan
        self._next_step += 1
        return plan

    def retire(
        self, step_id: int, tokens: Sequence[int], candidates: Iterable[Sequence[Candidate]] = ()
    ) -> tuple[Event, ...]:
        """Learn the tokens of the oldest step in flight, one for each request that samples; ghosts' are dropped.

        `candidates`: for each of them that is a beam its likeliest tokens, as many as its search asks for. Events in
        row order; a request that does not hear all has one for its first token and one for its end.
        """
        assert step_id == next(iter(self._in_flight), None), f"step {step_id} is not the oldest of {[*self._in_flight]}"
        plan = self._in_flight.pop(step_id)
        assert len(tokens) == len(plan.sampling), f"{len(tokens)} tokens, {len(plan.sampling)} were sampled"
        events = self._accept(plan.sampling, tokens, iter(candidates))
        self._release_idle()
        return tuple(events)

    def _accept(
        self, requests: Sequence[Request], tokens: Sequence[int], candidates: Iterator[Sequence[Candidate]]
    ) -> list[Event]:
        events: list[Event] = []
        ghosts = 0
        for request, token in zip(requests, tokens, strict=True):
            group = request.group
            found = next(candidates) if group is not None else ()
            if request.finish_reason is not None:
                ghosts += 1
                continue
            if group is not None:
                events += self._accept_beam(request, group, found)
                continue
            reason = request.accept(token)
            if reason is not None:
                events.append(self._end(request, reason, request.output[-1]))  # which may have been forced
                continue
            if request.lockstep:
                self._go_on(request)
            if request.hears_all or len(request.output) == 1:
                events.append(Event(request.id, token, None))
        self.counters.generated_tokens += len(tokens) - ghosts
        return events

    def _accept_beam(self, request: Request, group: BeamGroup, found: Sequence[Candidate]) -> tuple[Event, ...]:
        """The group's end, if this is the last result of its last round. One that is preempted begins anew."""
        if request.slot in self._slots.leaving or not group.take(request, found):
            return ()
        if group.search.done:
            return (self._end(request, group.finish_reason),)
        self._forking[group.id] = group
        return ()

    def _go_on(self, request: Request) -> None:
        """One in lockstep may compute the sample just learnt, unless it is preempted."""
        if request.slot is not None and request.slot not in self._slots.leaving:
            request.goal += 1
            self._slots.prompts[request.slot] = request

    def fail(self, step_id: int, error: Exception) -> tuple[Event, ...]:
        """A step in flight died (any: a launch fails while an older step runs); its unfinished requests end so too.

        And so do those of later steps that were to read the blocks which this one should have filled.
        """
        plan = self._in_flight.pop(step_id)
        doomed = withdraw(plan, [later for later in self._in_flight.values() if later.step_id > step_id], self.kv)
        self._slots.spoiled.update(each.slot for r in doomed for each in r.members if each.slot is not None)
        events = [self._end(r, "error", error=error) for r in doomed if not r.finish_reason]
        self._release_idle()
        return tuple(events)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> Event | None:
        """End a request from outside at any time; None if it has ended already. A stop string ends it with "stop"."""
        request = self._live.get(request_id)
        if request is None:
            return None
        event = self._end(request, reason)
        self._release_idle()
        return event

    def _end(
        self, request: Request, reason: FinishReason, token: int | None = None, error: Exception | None = None
    ) -> Event:
        del self._live[request.id]
        for member in request.members:
            member.finish_reason = reason
        if request.slot is None:
            self._waiting.remove(request)
        else:
            self._leave(request)
        return Event(request.id, token, reason, error)

    def _leave(self, request: Request) -> None:
        """No step will take a token of it any more; its slot is its own until those in flight have retired."""
        self._forking.pop(request.id, None)
        for member in request.members:
            if self._slots.leave(member) and member.slot is not None:
                self.kv.break_promises(member.slot)
        if request.decodes:  # otherwise it is not among the decoders, or has left them with its last launch
            self._decoders = None

    def _release_idle(self) -> None:
        """Free the slots of those that leave and that no step in flight touches; a group's at once."""
        for request in self._slots.idle(self._in_flight.values()):
            slot = request.slot
            assert slot is not None
            if self._slots.vacate(request):
                self._publish_known(request, slot)
            self.kv.free(slot)
            if request.finish_reason is None:
                self._requeue(request)

    def _requeue(self, request: Request) -> None:
        """It was preempted."""
        if request.group is not None:
            request.output = []
            request.group.restart()
        request.rewind()
        if request is request.members[0]:
            self._waiting.add(request)

    def _publish_known(self, request: Request, slot: int) -> None:
        """What it has generated may be another's prompt, or its own again. Beams' are not: nobody asks for the like."""
        if request.group is None:
            self.name_blocks(request)
            full = min(request.num_computed, request.num_known) // self.kv.block_size
            self.kv.publish(slot, 0, request.keys[:full])

    def waste(self) -> float:
        """Share of the room in held blocks that holds no token; 0 to 1."""
        return self.kv.waste({slot: request.num_computed for slot, request in self._slots.occupied.items()})

    def check(self) -> None:
        """Prove that slots, blocks and steps in flight agree."""
        self.kv.check()
        self._slots.check(self.kv.slots)
        for request in self._slots.staying():
            slot = request.slot
            assert slot is not None and not self.kv.lacks(slot, request.num_computed), f"slot {slot} lacks blocks"
        for plan in self._in_flight.values():
            assert plan.slots <= self._slots.occupied.keys(), f"step {plan.step_id} touches a free slot"
