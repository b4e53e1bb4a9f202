"""What a service asks of the runtime beside text: deadlines, priorities, tenants apart, a pace, and counters."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, SamplingParams
from penstock.engine import store
from penstock.errors import OptionError
from penstock.runtime.executor import Executor
from penstock.runtime.intake import Submission
from penstock.runtime.pace import Pace
from penstock.runtime.requests import RequestOutput
from penstock.runtime.step import CpuBackend

LONG = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
HEAD = list(range(2, 140))


@pytest.fixture(scope="module")
def llm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    limits = {"max_batch_size": 2, "max_num_tokens": 64}
    with LLM(tiny_model, device="cpu", cache_dir=tmp_path_factory.mktemp("cache"), **limits) as llm:
        yield llm


def executor(engine: Path, **more: Any) -> Executor:
    loaded = store.load(engine)
    return Executor(loaded, CpuBackend(loaded, engine), None, **more)


def test_a_request_past_its_time_ends_with_what_it_has(llm: LLM) -> None:
    (whole,) = llm.generate({"prompt_token_ids": [5, 6]}, LONG)
    (output,) = llm.generate({"prompt_token_ids": [5, 6]}, LONG, timeout=(whole.metrics.latency or 1.0) / 3)
    (cut,) = output.outputs
    assert cut.finish_reason == "timeout" and 0 < len(cut.token_ids) < 150
    assert cut.token_ids == whole.outputs[0].token_ids[: len(cut.token_ids)]
    assert llm.stats()["kv_cache_usage"] == 0


def test_who_waits_too_long_in_the_queue_never_runs(tiny_engine: Path) -> None:
    """Four slots; who was admitted in time may go on."""
    runs, outputs = executor(tiny_engine), dict[str, RequestOutput]()
    sink = lambda output: outputs.update({output.request_id: output})  # noqa: E731
    for i in range(6):
        runs.submit(Submission(str(i), (5, 6 + i), LONG, sink, queue_timeout=5.0))
    runs.step()
    waited = time.monotonic
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: waited() + 6.0)
        while runs.busy:
            runs.step()
    reasons = [outputs[str(i)].outputs[0].finish_reason for i in range(6)]
    assert reasons == ["length"] * 4 + ["timeout"] * 2
    assert not outputs["5"].outputs[0].token_ids and outputs["5"].metrics.admitted is None


def test_one_text_in_time_is_enough_for_several(tiny_engine: Path) -> None:
    """The wait of a request with several texts is over with the first that runs."""
    runs, done = executor(tiny_engine), queue.SimpleQueue[RequestOutput]()
    params = SamplingParams(temperature=1.0, n=6, max_tokens=30, seed=1, ignore_eos=True)
    runs.submit(Submission("a", (5,), params, done.put, queue_timeout=0.05))  # type: ignore[arg-type]
    while runs.busy:
        runs.step()
        time.sleep(0.002)
    assert {each.finish_reason for each in done.get().outputs} == {"length"}


@pytest.mark.parametrize("name", ["timeout", "queue_timeout"])
@pytest.mark.parametrize("value", [0, -1.0, "1", True, float("nan")])
def test_seconds_that_are_none_are_refused(llm: LLM, name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{name}="):
        llm.generate("x", SHORT, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("priority", 1.5), ("priority", True), ("priority", 2**40), ("cache_salt", 3), ("cache_salt", "\ud800")],
)
def test_what_is_no_priority_or_salt_is_refused(llm: LLM, name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{name}="):
        llm.generate("x", SHORT, **{name: value})


def test_the_lower_priority_number_goes_first(tiny_engine: Path) -> None:
    runs, order = executor(tiny_engine), list[str]()
    for i, priority in enumerate((0, 0, 0, 0, 5, -5, 0)):  # the first four take all slots
        sink = lambda output: order.append(output.request_id)  # noqa: E731
        runs.submit(Submission(str(i), (5, 6), SHORT, sink, priority=priority))
        if i == 3:
            runs.step()
    while runs.busy:
        runs.step()
    assert order.index("5") < order.index("6") < order.index("4")


def test_an_id_used_again_hears_nothing_of_the_one_before(tiny_engine: Path) -> None:
    """A cancelled request has a row in flight when another of its name comes."""
    runs, done = executor(tiny_engine), list[Any]()
    runs.backend.steps_in_flight = 2
    runs.scheduler.limits = replace(runs.scheduler.limits, max_steps_in_flight=2)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=1)
    runs.submit(Submission("a", (5, 6), params, done.append))
    runs.step()
    runs.step()
    runs.abort("a")
    runs.submit(Submission("a", (7, 8, 9), params, done.append))
    while runs.busy:
        runs.step()
    scores = done[1].outputs[0].logprobs
    assert [next(iter(each)) for each in scores] == list(done[1].outputs[0].token_ids)


def test_tenants_share_no_kv(llm: LLM) -> None:
    def reused(salt: str) -> int:
        return llm.generate({"prompt_token_ids": HEAD}, SHORT, cache_salt=salt)[0].metrics.reused_tokens

    assert [reused("a"), reused("a"), reused("b"), reused(""), reused("b")] == [0, 128, 0, 0, 128]


def test_a_pace_makes_chunks_smaller_and_changes_no_token(tiny_engine: Path) -> None:
    """A target that no step can meet: prompts beside a running request come in the least chunks."""
    engine, texts, largest = store.load(tiny_engine), [], []
    for pace in (None, Pace(engine, 1e-6)):
        runs, done = executor(tiny_engine, pace=pace, reuse=False), dict[str, Any]()
        sizes: list[int] = []
        launch = runs.backend.launch
        runs.backend.launch = lambda *a, launch=launch, sizes=sizes: sizes.append(a[1]) or launch(*a)  # type: ignore[method-assign, misc]
        for i, prompt in enumerate(((5, 6), tuple(HEAD), tuple(HEAD[::-1]))):
            runs.submit(
                Submission(
                    str(i), prompt, LONG, lambda o, done=done: done.update({o.request_id: o.outputs[0].token_ids})
                )
            )
            runs.step()
            runs.step()
        while runs.busy:
            runs.step()
        texts.append(done)
        largest.append(max(sizes[2:]))
    assert texts[0] == texts[1] and largest[1] <= 3 + 16 < largest[0]


def test_the_target_reaches_the_executor(tiny_model: Path, cache: Path) -> None:
    with LLM(tiny_model, device="cpu", cache_dir=cache, inter_token_latency_target=0.05) as llm:
        assert llm.generate({"prompt_token_ids": HEAD}, SHORT)[0].finished
    with pytest.raises(OptionError, match=r"inter_token_latency_target=-1"):
        LLM(tiny_model, device="cpu", cache_dir=cache, inter_token_latency_target=-1)


def test_what_was_counted(llm: LLM) -> None:
    before = llm.stats()
    llm.generate({"prompt_token_ids": [5, 6]}, SamplingParams(n=3, max_tokens=4, temperature=1.0, logprobs=1))
    after = llm.stats()
    assert after["requests"] == before["requests"] + 1 and after["prompt_tokens"] == before["prompt_tokens"] + 2
    assert (
        after["controlled_steps"] > before["controlled_steps"]
        and after["steps_off_fast_path"] == before["steps_off_fast_path"]
    )
    assert 0 < after["device_busy"] <= 1


def test_several_texts_stream_together(llm: LLM) -> None:
    async def run() -> list[RequestOutput]:
        params = SamplingParams(temperature=1.0, seed=2, n=2, max_tokens=6, ignore_eos=True)
        return [part async for part in llm.generate_async({"prompt_token_ids": [9]}, params)]

    parts = asyncio.run(run())
    last = parts[-1]
    assert last.finished and not any(part.finished for part in parts[:-1])
    assert [len(each.token_ids) for each in last.outputs] == [6, 6]
    for part in parts:
        for each in part.outputs:
            assert each.token_ids == last.outputs[each.index].token_ids[: len(each.token_ids)]


def test_an_abandoned_request_takes_all_its_texts_along(llm: LLM) -> None:
    async def leave() -> None:
        params = SamplingParams(temperature=1.0, seed=2, n=2, max_tokens=150, ignore_eos=True)
        async for _ in llm.generate_async({"prompt_token_ids": [9]}, params):
            return

    asyncio.run(leave())
    stats = llm.stats()
    assert stats["requests_running"] == stats["requests_waiting"] == stats["kv_cache_usage"] == 0
