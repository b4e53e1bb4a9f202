"""The scheduler by example: chunking, mixing, ghosts, refusals, failure."""

from __future__ import annotations

import pytest

from penstock.errors import OptionError, PromptError, QueueFullError
from penstock.runtime.schedule.batch import Admission, Chunk, Decoders, Event, Row, StepPlan
from penstock.runtime.schedule.limits import Limits
from penstock.runtime.schedule.queue import PATIENCE
from penstock.runtime.schedule.request import Request, Status
from penstock.runtime.schedule.scheduler import Scheduler
from tests.null.kv.books import books

EOS = 99


def scheduler(slots: int = 4, tokens: int = 8, length: int = 64, blocks: int = 65, in_flight: int = 2) -> Scheduler:
    return Scheduler(Limits(slots, tokens, length, in_flight), books(blocks, 4))


def request(name: str, prompt: int, max_tokens: int = 4, **more: object) -> Request:
    return Request(name, (1,) * prompt, max_tokens, max_seq_len=64, eos_ids=frozenset({EOS}), **more)  # type: ignore[arg-type]


def planned(s: Scheduler) -> StepPlan:
    plan = s.schedule()
    assert plan is not None
    return plan


def retire(s: Scheduler, plan: StepPlan, **tokens: int) -> tuple[Event, ...]:
    """Tokens by request id; 7 for who is not named."""
    return s.retire(plan.step_id, [tokens.get(row.request_id, 7) for row in plan.rows if row.samples])


def test_one_request_from_start_to_end_with_the_host_one_step_behind() -> None:
    s = scheduler()
    r = request("a", prompt=5, max_tokens=3)
    s.add(r)
    assert r.status is Status.WAITING and s.num_waiting == 1
    first = planned(s)
    assert first.rows == (Row(0, "a", 0, 5, True),) and (first.num_tokens, first.num_logits) == (5, 1)
    (admission,) = first.admitted
    assert admission.request is r and len(admission.block_tables[0]) == 2 and admission.block_tables == s.kv.tables(0)
    second = planned(s)
    assert second.rows == (Row(0, "a", 5, 1, True),) and second.admitted == ()
    assert (r.num_sampled, r.num_unknown, r.output) == (2, 2, [])
    assert not s.can_schedule
    assert retire(s, first) == (Event("a", 7, None),)
    third = planned(s)
    assert third.rows == (Row(0, "a", 6, 1, True),)
    assert retire(s, second, a=8) == (Event("a", 8, None),)
    assert s.schedule() is None, "three samples are launched, a fourth is never asked for"
    assert retire(s, third) == (Event("a", 7, "length"),)
    assert r.output == [7, 8, 7] and r.finish_reason == "length" and s.kv.usage == 0.0
    assert not s.has_work


def test_ghost_row_is_dropped_and_holds_its_slot_and_blocks() -> None:
    s = scheduler(slots=1)
    s.add(request("a", prompt=2))
    s.add(request("b", prompt=2))
    first, second = planned(s), planned(s)
    assert retire(s, first, a=EOS) == (Event("a", EOS, "stop"),)
    assert s.schedule() is None, "the ghost in step 1 still writes slot 0"
    assert s.kv.slots == {0} and s.num_running == 0
    assert retire(s, second) == ()
    assert planned(s).rows == (Row(0, "b", 0, 2, True),)


def test_stop_rules() -> None:
    s = scheduler()
    s.add(request("eos", 1, ignore_eos=True))
    s.add(request("id", 1, stop_ids=frozenset({5})))
    s.add(request("last", 1, max_tokens=1))
    plan = planned(s)
    events = retire(s, plan, eos=EOS, id=5, last=EOS)
    assert [event.finish_reason for event in events] == [None, "stop", "stop"]


def test_prompts_are_chunked_and_mixed_behind_decode_rows() -> None:
    s = scheduler(tokens=8)
    s.add(request("a", prompt=2, max_tokens=9))
    s.add(request("b", prompt=11))
    s.add(request("c", prompt=3))
    first = planned(s)
    assert first.rows == (Row(0, "a", 0, 2, True), Row(1, "b", 0, 6, False))
    plan = planned(s)
    assert plan.rows == (Row(0, "a", 2, 1, True), Row(1, "b", 6, 5, True), Row(2, "c", 0, 2, False))
    assert (plan.num_tokens, plan.num_logits, [r.id for r in plan.sampling]) == (8, 2, ["a", "b"])
    s.abort("a")
    assert retire(s, first) == ()
    assert planned(s).rows == (Row(1, "b", 11, 1, True), Row(2, "c", 2, 1, True))


def test_blocks_come_as_they_are_needed_and_nobody_overtakes() -> None:
    s = scheduler(blocks=8)  # 7 usable blocks of 4
    s.add(request("a", prompt=6, max_tokens=14))
    s.add(request("b", prompt=14, max_tokens=8, salt=b"b"))  # 4 blocks, and one to spare for each that runs: waits
    s.add(request("c", prompt=1, max_tokens=1))  # would fit, but came later
    s.limits = Limits(4, 24, 64)
    plan = planned(s)
    assert [admission.request.id for admission in plan.admitted] == ["a", "b"] and s.num_waiting == 1
    assert (s.kv.groups[0].num_blocks(0), s.kv.groups[0].num_blocks(1)) == (2, 4) and plan.grown == ()
    plans, grown = [plan], []
    for _ in range(3):
        plans.append(planned(s))
        grown += plans[-1].grown
        retire(s, plans.pop(0))
    assert [(slot, at) for slot, at, *_ in grown] == [(0, 2)], "a's position 8 is the first of a block"
    held = sum(r.num_computed for r in s._slots.occupied.values())
    assert s.waste() == pytest.approx(1 - held / (4 * s.kv.groups[0].pool.num_used))


def preempted(lockstep: bool = False, **more: int) -> tuple[Scheduler, list[StepPlan], Request, Request]:
    """Two requests of which the pool holds one and a half, until one of them had to leave."""
    s = scheduler(slots=2, blocks=8, **more)
    a, b = request("a", prompt=7, max_tokens=17), request("b", prompt=6, max_tokens=17, lockstep=lockstep)
    s.add(a)
    s.add(b)
    plans: list[StepPlan] = []
    for _ in range(60):
        if s.counters.preemptions:
            return s, plans, a, b
        if s.can_schedule and (plan := s.schedule()):
            plans.append(plan)
        if plans and not s.can_schedule:
            retire(s, plans.pop(0))
    raise AssertionError("nobody was preempted")


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_the_last_to_come_is_preempted_and_computed_anew(in_flight: int, lockstep: bool) -> None:
    s, plans, a, b = preempted(lockstep, tokens=16, in_flight=in_flight)
    while plans:
        retire(s, plans.pop(0))
    assert b.slot is None and b.num_preemptions == 1 and b.goal == 6 + len(b.output) and s.num_waiting == 1
    known = len(b.output)
    while s.has_work:
        if s.can_schedule and (plan := s.schedule()):
            for admission in plan.admitted:
                assert admission.request is b and admission.num_reused in range(4, b.goal), "its full blocks were kept"
            plans.append(plan)
        if plans:
            retire(s, plans.pop(0))
    assert len(b.output) == 17 > known and len(a.output) == 17 and a.num_preemptions == 0
    assert s.kv.usage == 0
    s.check()


def test_a_lower_priority_number_goes_first_and_is_preempted_last() -> None:
    s = scheduler(slots=1, in_flight=1)
    for name, priority in (("a", 1), ("b", 1), ("c", 0)):
        s.add(request(name, 2, max_tokens=1, priority=priority))
    assert [planned_and_retired(s) for _ in range(3)] == [["c"], ["a"], ["b"]]


def planned_and_retired(s: Scheduler) -> list[str]:
    plan = planned(s)
    retire(s, plan)
    return [row.request_id for row in plan.rows]


def test_nobody_waits_for_ever_behind_a_better_priority() -> None:
    s = scheduler(slots=1, in_flight=1)
    s.add(request("patient", 2, max_tokens=1, priority=1))
    served = []
    for i in range(PATIENCE + 1):
        s.add(request(f"r{i}", 2, max_tokens=1))
        served += planned_and_retired(s)
    assert served.index("patient") == PATIENCE


def test_queue_limits_refuse_with_the_remedy() -> None:
    s = scheduler()
    s.limits = Limits(4, 8, 64, max_num_queued_reqs=2, max_num_queued_tokens=9)
    s.add(request("a", 20))  # alone it may be long
    with pytest.raises(QueueFullError, match=r"with its 2 tokens 22 would wait.*max_num_queued_tokens=9"):
        s.add(request("b", 2))
    s.limits = Limits(4, 8, 64, max_num_queued_reqs=1)
    with pytest.raises(QueueFullError, match="1 requests wait, the limit is max_num_queued_reqs=1; try again later"):
        s.add(request("b", 2))
    assert s.num_waiting == 1


def test_equal_prefixes_are_computed_once_and_waited_for() -> None:
    s = scheduler(tokens=8, in_flight=1)
    for name in "abc":
        s.add(request(name, prompt=11, max_tokens=1))
    s.add(request("other", prompt=11, max_tokens=1, salt=b"tenant"))
    first = planned(s)
    assert [row[1:4] for row in first.rows] == [("a", 0, 8)]
    retire(s, first)
    second = planned(s)
    assert [row[1:4] for row in second.rows] == [("a", 8, 3), ("b", 8, 3), ("c", 8, 2)]
    assert [(x.request.id, x.num_reused) for x in second.admitted] == [("b", 8), ("c", 8)]
    retire(s, second)
    third = planned(s)
    assert [row[1:4] for row in third.rows] == [("c", 10, 1), ("other", 0, 7)]
    assert (s.counters.asked_tokens, s.counters.reused_tokens) == (44, 16)


def test_who_waits_for_a_prefix_lets_others_pass() -> None:
    s = scheduler(tokens=8, in_flight=2)
    s.add(request("a", prompt=8, max_tokens=1))
    s.add(request("b", prompt=9, max_tokens=1))
    s.add(request("c", prompt=1, max_tokens=1))
    s.limits = Limits(4, 9, 64)
    assert [row.request_id for row in planned(s).rows] == ["a", "c"]
    assert [row[1:3] for row in planned(s).rows] == [("b", 8)]


def test_a_prompt_leaves_room_for_those_who_decode() -> None:
    s = Scheduler(Limits(4, 64, 64, 1), books(65, 4), prompt_budget=lambda decoding: 5 * decoding)
    s.add(request("a", 2, max_tokens=9))
    retire(s, planned(s))
    s.add(request("b", 30))
    assert [row.num_tokens for row in planned(s).rows] == [1, 5]


def test_blocks_of_a_failed_step_are_not_found() -> None:
    s, error = scheduler(tokens=8, in_flight=2), RuntimeError("out of luck")
    s.add(request("a", prompt=8, max_tokens=2))
    s.add(request("b", prompt=9, max_tokens=2))
    first, second = planned(s), planned(s)
    assert [row[1:3] for row in second.rows] == [("a", 8), ("b", 8)]
    assert [event.request_id for event in s.fail(first.step_id, error)] == ["a", "b"], (
        "b was to read what a had written"
    )
    retire(s, second)
    s.add(request("c", prompt=9, max_tokens=2))
    assert [row[1:3] for row in planned(s).rows] == [("c", 0)]


def test_lockstep_waits_for_its_last_sample_and_never_decodes() -> None:
    s = scheduler(tokens=8)
    a, b = request("a", prompt=3, max_tokens=9), request("b", prompt=4, max_tokens=3, lockstep=True)
    s.add(a)
    s.add(b)
    plans = [planned(s), planned(s)]
    assert [row[1:] for row in plans[1].rows] == [("a", 3, 1, True)], "b's sample is not known"
    retire(s, plans.pop(0))
    plans.append(planned(s))
    assert plans[-1].chunks == (Chunk(b, 1, 4, 1, 1, True),) and b.goal == 5 and plans[-1].grown[-1][:2] == (1, 1)
    assert plans[-1].sampling == (a, b) and [*plans[-1].sample_rows] == [0, 1]
    retire(s, plans.pop(0))
    retire(s, plans.pop(0), b=EOS)
    assert b.finish_reason == "stop" and b.output == [7, EOS]
    s.check()


def test_the_share_of_prompts_does_not_hold_up_who_is_in_lockstep() -> None:
    s = Scheduler(Limits(8, 64, 64, 1), books(65, 4), prompt_budget=lambda decoding: decoding // 2)
    for name in "abcd":
        s.add(request(name, 2, salt=name.encode(), lockstep=True))
    retire(s, planned(s))
    s.add(request("e", 30))
    assert [row[1:4] for row in planned(s).rows] == [*((name, 2, 1) for name in "abcd"), ("e", 0, 2)]


def test_a_prompt_that_scores_leaves_logit_rows_to_the_others_and_finds_nothing() -> None:
    s = scheduler(slots=4, tokens=32, in_flight=1)
    s.add(request("seen", prompt=9, max_tokens=1))
    retire(s, planned(s))
    d, e = request("d", 2, max_tokens=20, salt=b"d"), request("e", 9, max_tokens=2, scores=True, controlled=True)
    s.add(d)
    retire(s, planned(s))
    s.add(e)
    s.add(request("f", 2, salt=b"f"))
    plan = planned(s)
    assert [chunk[2:] for chunk in plan.chunks] == [(0, 3, 3, False)], "4 logit rows, of which d has one"
    assert plan.num_logits == 4 and plan.sampling == (d,) and [*plan.sample_rows] == [0] and plan.controlled
    assert plan.admitted[0].num_reused == 0 and s.num_waiting == 1
    retire(s, plan)
    retire(s, planned(s))
    plan = planned(s)
    assert [chunk[2:] for chunk in plan.chunks] == [(6, 3, 3, True)] and [*plan.sample_rows] == [0, 3]
    assert len(retire(s, plan)) == 2
    last = planned(s)
    assert [row[1:4] for row in last.rows] == [("d", 5, 1), ("e", 9, 1), ("f", 0, 2)] and last.num_logits == 3
    assert last.controlled and not e.scoring


def test_a_block_begun_by_a_failed_step_is_not_found_when_a_later_one_fills_it() -> None:
    s = scheduler(tokens=6, in_flight=2)
    s.add(request("a", prompt=10, max_tokens=2))
    first, second = planned(s), planned(s)
    assert [row[2:4] for row in (*first.rows, *second.rows)] == [(0, 6), (6, 4)] and len(second.published) == 1
    s.fail(first.step_id, RuntimeError("out of luck"))
    retire(s, second)
    assert s.kv.groups[0].pool.num_idle == 0, "the second block's first half was never written"
    s.check()


def test_max_seq_len_ends_a_request() -> None:
    r = request("a", prompt=60, max_tokens=1000)
    assert (r.output_limit, r.max_length) == (4, 64)
    s = scheduler(tokens=64, in_flight=1)
    s.add(r)
    events = [retire(s, planned(s))[0] for _ in range(4)]
    assert [event.finish_reason for event in events] == [None, None, None, "length"] and not s.has_work


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (0, 4, "'x' is empty"),
        (64, 4, "64 tokens, the limit is 63 .*max_seq_len=64"),
        (20, 20, r"may become 40 tokens long .*holds 32 \(8 blocks of 4\); lower max_tokens"),
    ],
)
def test_prompts_that_could_never_run_are_refused(prompt: int, max_tokens: int, message: str) -> None:
    s = scheduler(blocks=9)
    with pytest.raises(PromptError, match=message):
        s.add(request("x", prompt, max_tokens))
    assert not s.has_work and s.schedule() is None


def test_an_id_in_use_is_refused_and_free_again_after_the_end() -> None:
    s = scheduler()
    s.add(request("a", 2))
    with pytest.raises(OptionError, match="'a' is taken"):
        s.add(request("a", 2))
    first = planned(s)
    assert s.abort("a") == Event("a", None, "abort")
    s.add(request("a", 3))  # the old one is a ghost yet
    second = planned(s)
    assert second.rows == (Row(1, "a", 0, 3, True),)
    assert retire(s, first) == () and retire(s, second) == (Event("a", 7, None),)


def test_abort_waiting_running_unknown_and_for_a_stop_string() -> None:
    s = scheduler(slots=1, in_flight=1)
    for name in ("a", "b", "c"):
        s.add(request(name, 2))
    retire(s, planned(s))
    assert s.abort("b") == Event("b", None, "abort") and s.num_waiting == 1
    assert s.abort("a", reason="stop") == Event("a", None, "stop"), "nothing in flight: the slot is free at once"
    assert s.abort("a") is None and s.abort("nobody") is None
    assert planned(s).rows == (Row(0, "c", 0, 2, True),)


def test_a_failed_step_ends_its_requests_only() -> None:
    s, error = scheduler(slots=3), RuntimeError("out of luck")
    s.add(request("a", 2, max_tokens=1))
    s.add(request("b", 2))
    first = planned(s)
    s.add(request("c", 2))
    second = planned(s)  # b and c
    assert s.fail(second.step_id, error) == (Event("b", None, "error", error), Event("c", None, "error", error))
    assert s.kv.slots == {0, 1}, "b is still in step 0"
    assert retire(s, first) == (Event("a", 7, "length"),)
    assert not s.has_work
    s.check()


def test_retiring_out_of_order_or_with_wrong_slots_is_our_bug() -> None:
    s = scheduler()
    s.add(request("a", 2))
    first, second = planned(s), planned(s)
    with pytest.raises(AssertionError, match="not the oldest"):
        retire(s, second)
    with pytest.raises(AssertionError, match="2 steps are in flight"):
        s.schedule()
    with pytest.raises(AssertionError, match="sampled"):
        s.retire(first.step_id, [])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((0, 8, 8), "max_batch_size=0"),
        ((1, 8, 1), "max_seq_len=1"),
        ((9, 8, 8), "max_num_tokens=8 is less than max_batch_size=9"),
        ((1, 8, 8, 0), "max_steps_in_flight=0"),
    ],
)
def test_limits_that_cannot_work_are_refused(limits: tuple[int, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Limits(*limits)


def test_plan_invariants() -> None:
    nobody, chunk = Decoders((), 4), Chunk(request("a", 4), 0, 3, 1, 1, True)
    for chunks in ((), (chunk, chunk), (chunk._replace(num_tokens=0),)):
        with pytest.raises(AssertionError):
            StepPlan(0, nobody, 0, chunks)
    with pytest.raises(AssertionError, match="does not begin with its first token"):
        StepPlan(0, nobody, 0, (chunk,), (Admission(0, chunk.request, (1,), 2),))
    decoding = request("b", 2)
    decoding.slot, decoding.num_computed = 0, 2
    with pytest.raises(AssertionError, match="two rows"):
        StepPlan(0, Decoders((decoding,), 4), 0, (chunk,))
    with pytest.raises(AssertionError, match="2 requests decode in slots"):
        Decoders((decoding, decoding), 4)


def test_decoders_stay_until_somebody_joins_or_leaves() -> None:
    s = scheduler(tokens=16)
    s.add(request("a", 2, max_tokens=8))
    s.add(request("b", 2, max_tokens=8))
    plans = [planned(s), planned(s)]
    retire(s, plans.pop(0))
    plans.append(planned(s))
    together = plans[-1].decoders
    assert together is plans[0].decoders and [row.start for row in plans[-1].rows] == [3, 3]
    s.add(request("c", 2))
    retire(s, plans.pop(0))
    plans.append(planned(s))
    assert plans[-1].decoders is together and [row.request_id for row in plans[-1].rows] == ["a", "b", "c"]
    retire(s, plans.pop(0), a=EOS)
    plans.append(planned(s))
    assert [row[1:3] for row in plans[-1].rows] == [("b", 5), ("c", 2)]
    s.check()


def test_who_does_not_hear_all_hears_the_first_token_and_the_end() -> None:
    s = scheduler(in_flight=1)
    s.add(request("loud", 2, max_tokens=4))
    s.add(request("quiet", 2, max_tokens=4, hears_all=False))
    heard = [[event.request_id for event in retire(s, planned(s))] for _ in range(4)]
    assert heard == [["loud", "quiet"], ["loud"], ["loud"], ["loud", "quiet"]] and s.counters.generated_tokens == 8
