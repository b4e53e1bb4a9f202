"""The scheduler by example: chunking, mixing, ghosts, refusals, failure."""

from __future__ import annotations

import pytest

from penstock.errors import OptionError, PromptError
from penstock.runtime.kv.blocks import BlockPool, KvManager
from penstock.runtime.schedule.batch import Chunk, Decoders, Event, Row, StepPlan
from penstock.runtime.schedule.request import Request, Status
from penstock.runtime.schedule.scheduler import Limits, Scheduler

EOS = 99


def scheduler(slots: int = 4, tokens: int = 8, length: int = 64, blocks: int = 65, in_flight: int = 2) -> Scheduler:
    return Scheduler(Limits(slots, tokens, length, in_flight), KvManager(BlockPool(blocks, 4)))


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
    assert admission.request is r and len(admission.block_table) == 2 and admission.block_table == s.kv.table(0)
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


def test_whole_length_is_reserved_and_nobody_overtakes() -> None:
    s = scheduler(blocks=9)  # 8 usable blocks of 4
    s.add(request("a", prompt=6, max_tokens=14))  # 5 blocks
    s.add(request("b", prompt=6, max_tokens=14))  # 5 blocks: waits
    s.add(request("c", prompt=1, max_tokens=1))  # would fit, but came later
    plan = planned(s)
    assert [admission.slot for admission in plan.admitted] == [0] and s.kv.pool.num_used == 5 and s.num_waiting == 2
    retire(s, plan, a=EOS)
    assert [admission.request.id for admission in planned(s).admitted] == ["b", "c"]


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
    nobody, chunk = Decoders(()), Chunk(request("a", 4), 0, 3, 1, True)
    for chunks in ((), (chunk, chunk), (chunk._replace(num_tokens=0),), (chunk._replace(start=0),)):
        with pytest.raises(AssertionError):
            StepPlan(0, nobody, 0, chunks)
    decoding = request("b", 2)
    decoding.slot, decoding.num_computed = 0, 2
    with pytest.raises(AssertionError, match="two rows"):
        StepPlan(0, Decoders((decoding,)), 0, (chunk,))
    with pytest.raises(AssertionError, match="2 requests decode in slots"):
        Decoders((decoding, decoding))


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
    assert heard == [["loud", "quiet"], ["loud"], ["loud"], ["loud", "quiet"]] and s.num_generated == 8
