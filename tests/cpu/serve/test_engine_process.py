"""The real engine process with the bundled model: what it says is what LLM says, and no death loses a request."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM, SamplingParams
from penstock.errors import ExecutorError, OptionError, PenstockError, PromptError, QueueFullError, SamplingError
from penstock.grammar.compiled import Compiled
from penstock.runtime.requests import CompletionOutput
from penstock.serve.client import EngineReply
from penstock.serve.link import EngineDied, EngineUnready
from penstock.serve.supervisor import Supervisor
from penstock.serve.wire import Part, Submit

PROMPT = [0, 3297, 328, 791, 262, 708]
SECRET = [*range(3001, 3060)]
LONG = {"temperature": 0.0, "max_tokens": 500, "ignore_eos": True}
QUEUE = 512


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def supervisor(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    arguments = {"device": "cpu", "max_num_queued_reqs": QUEUE}
    supervisor = Supervisor(arguments, crash_dir=tmp_path_factory.mktemp("crashes"), first_backoff=0.05)

    async def open() -> None:
        supervisor.start()
        await supervisor.ready()

    runner.run(open())
    yield supervisor
    runner.run(supervisor.stop())


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu") as llm:
        yield llm


_IDS = iter(range(10**6))


def send(supervisor: Supervisor, params: dict[str, Any], prompt: list[int] = PROMPT, **more: Any) -> EngineReply:
    return supervisor.link.submit(Submit(f"test-{next(_IDS)}", prompt, params, time.monotonic(), **more))


async def whole(reply: EngineReply, texts: int = 1) -> list[list[Part]]:
    """All parts of each text."""
    found: list[list[Part]] = [[] for _ in range(texts)]
    while not all(parts and parts[-1].finish for parts in found):
        for part in await asyncio.wait_for(reply.parts(), 60):
            found[part.index].append(part)
    return found


async def text_of(supervisor: Supervisor, params: dict[str, Any], prompt: list[int] = PROMPT) -> list[list[Part]]:
    return await whole(send(supervisor, params, prompt), params.get("best_of", params.get("n", 1)))


def tokens(parts: list[Part]) -> tuple[int, ...]:
    return tuple(token for part in parts for token in part.tokens)


def stats(supervisor: Supervisor) -> dict[str, Any]:
    assert supervisor.link.beat is not None
    return supervisor.link.beat.stats


async def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.02)


def of_llm(llm: LLM, params: dict[str, Any]) -> list[CompletionOutput]:
    return [*llm.generate([{"prompt_token_ids": PROMPT}], SamplingParams(**params))[0].outputs]


CASES: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 24},
    {"temperature": 1.0, "seed": 5, "max_tokens": 12, "n": 3},
    {"temperature": 0.9, "seed": 6, "max_tokens": 9, "logprobs": 4, "repetition_penalty": 1.2},
    {"temperature": 0.0, "max_tokens": 60, "stop_token_ids": [708]},
    {"temperature": 0.0, "max_tokens": 8, "logit_bias": {708: 100.0}},
]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_what_comes_is_what_llm_gives(
    runner: asyncio.Runner, supervisor: Supervisor, llm: LLM, params: dict[str, Any]
) -> None:
    texts = runner.run(text_of(supervisor, params))
    for parts, expected in zip(texts, of_llm(llm, params), strict=True):
        assert tokens(parts) == expected.token_ids
        assert parts[-1].finish == expected.finish_reason
        assert parts[-1].stop_token == expected.stop_reason
        assert parts[-1].ended_by_token == (expected.finish_reason == "stop")
        scores = [each for part in parts for each in part.logprobs or ()]
        assert tuple(scores) == (expected.logprobs or ())
        times = parts[-1].times
        assert times and times.arrival < (times.admitted or 0) < (times.first_token or 0) <= (times.finished or 0)
    assert [part.notes for part in texts[0]][1:] == [[]] * (len(texts[0]) - 1), "notes come once"
    assert "top_k=0 (default)" in texts[0][0].notes


def test_all_texts_of_best_of_come_with_what_ranks_them(
    runner: asyncio.Runner, supervisor: Supervisor, llm: LLM
) -> None:
    params = {"temperature": 1.0, "seed": 3, "max_tokens": 10, "n": 1, "best_of": 4}
    texts = runner.run(text_of(supervisor, params))
    totals = [sum(lp[t] for p in parts for t, lp in zip(p.tokens, p.logprobs or (), strict=True)) for parts in texts]
    best = totals.index(max(totals))
    assert tokens(texts[best]) == of_llm(llm, params)[0].token_ids
    assert len(set(map(tokens, texts))) > 1


def test_prompt_logprobs_come_once(runner: asyncio.Runner, supervisor: Supervisor, llm: LLM) -> None:
    params = {"temperature": 0.0, "max_tokens": 3, "prompt_logprobs": 2, "n": 2}
    texts = runner.run(text_of(supervisor, params))
    expected = llm.generate([{"prompt_token_ids": PROMPT}], SamplingParams(**params))[0].prompt_logprobs
    assert [part.prompt_logprobs for parts in texts for part in parts if part.prompt_logprobs] == [[*(expected or ())]]
    assert all(part.logprobs is None for parts in texts for part in parts)


def test_a_beam_search_comes_whole(runner: asyncio.Runner, supervisor: Supervisor, llm: LLM) -> None:
    params = {"use_beam_search": True, "beam_width": 4, "n": 2, "max_tokens": 8}
    parts = runner.run(send(supervisor, params).parts())
    expected = of_llm(llm, params)
    assert [tuple(part.tokens) for part in parts] == [each.token_ids for each in expected]
    assert [(part.score, part.cumulative) for part in parts] == [(x.score, x.cumulative_logprob) for x in expected]
    assert not supervisor.link.num_open


REFUSED: list[tuple[dict[str, Any], dict[str, Any], type[PenstockError], str]] = [
    ({"temperature": -1.0}, {}, SamplingError, "temperature=-1.0"),
    ({"temprature": 1.0}, {}, SamplingError, "temprature"),
    ({"stop": ["x"]}, {}, SamplingError, "stop"),
    ({"n": "x"}, {}, SamplingError, "n='x'"),
    ({"logit_bias": {99999: 1.0}}, {}, SamplingError, "99999"),
    ({}, {"prompt": []}, PromptError, "empty"),
    ({}, {"prompt": [-1]}, PromptError, "-1"),
    ({}, {"prompt": [5] * 2000}, PromptError, "2000"),
    ({}, {"timeout": -1.0}, OptionError, "timeout"),
    ({}, {"priority": 2**40}, OptionError, "priority"),
    ({"guided_decoding": {"regex": "a"}}, {}, SamplingError, "guided_decoding"),
    ({}, {"grammar": b"x"}, ExecutorError, "no grammar has the key 78"),
    ({}, {"embed": True}, OptionError, "embed"),
]


@pytest.mark.parametrize("params, more, error, said", REFUSED, ids=str)
def test_a_refusal_is_the_request_s_own_error(
    runner: asyncio.Runner, supervisor: Supervisor, params: Any, more: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        runner.run(send(supervisor, params, **more).parts())
    assert not supervisor.link.num_open


def test_a_grammar_of_another_engine_is_refused(runner: asyncio.Runner, supervisor: Supervisor) -> None:
    other = Compiled(b"x")
    new = Submit("other", PROMPT, {}, time.monotonic(), grammar=other.key)
    with pytest.raises(SamplingError, match="not compiled for this engine"):
        runner.run(supervisor.link.submit(new, other).parts())


def test_an_id_is_taken_while_its_request_runs(runner: asyncio.Runner, supervisor: Supervisor) -> None:
    async def twice() -> None:
        reply = supervisor.link.submit(Submit("same", PROMPT, LONG, time.monotonic()))
        with pytest.raises(OptionError, match="taken"):
            supervisor.link.submit(Submit("same", PROMPT, LONG, time.monotonic()))
        reply.abort()

    runner.run(twice())


def test_more_requests_than_slots_and_a_full_queue(runner: asyncio.Runner, supervisor: Supervisor) -> None:
    async def full() -> None:
        replies = [send(supervisor, LONG | {"n": 256}) for _ in range(4)]
        with pytest.raises(QueueFullError, match="max_num_queued_reqs"):
            await replies[-1].parts()
        for reply in replies:
            reply.abort()

    async def both() -> list[tuple[int, ...]]:
        params = {"temperature": 1.0, "max_tokens": 4}
        replies = [send(supervisor, params | {"seed": i % 7}, PROMPT) for i in range(300)]
        texts = [tokens((await whole(reply))[0]) for reply in replies]
        await full()
        return texts

    texts = runner.run(both())
    assert texts == texts[:7] * 42 + texts[:6]
    runner.run(until(lambda: stats(supervisor)["requests_running"] == stats(supervisor)["requests_waiting"] == 0))


def test_one_text_can_be_aborted_alone_and_all_frees_the_blocks(runner: asyncio.Runner, supervisor: Supervisor) -> None:
    async def aborting() -> None:
        reply = send(supervisor, LONG | {"n": 3, "temperature": 1.0})
        seen: set[int] = set()
        while seen != {0, 1, 2}:
            seen |= {part.index for part in await reply.parts()}
        reply.abort(1)
        await until(lambda: stats(supervisor)["requests_running"] == 2)
        later = [part for _ in range(4) for part in await reply.parts()]
        assert {part.index for part in later} == {0, 2}
        assert stats(supervisor)["kv_cache_usage"] > 0
        reply.abort()
        reply.abort()
        await until(lambda: stats(supervisor)["requests_running"] == 0 and stats(supervisor)["kv_cache_usage"] == 0)
        with pytest.raises(PenstockError, match="aborted"):
            await reply.parts()
        assert not supervisor.link.num_open

    runner.run(aborting())


def test_a_deadline_ends_a_text_with_what_it_has(runner: asyncio.Runner, supervisor: Supervisor) -> None:
    [parts] = runner.run(whole(send(supervisor, LONG, timeout=0.3)))
    assert parts[-1].finish == "timeout" and 0 < len(tokens(parts)) < 500


def test_parts_that_nobody_takes_become_one(runner: asyncio.Runner, supervisor: Supervisor, llm: LLM) -> None:
    async def late() -> list[Part]:
        reply = send(supervisor, LONG | {"max_tokens": 200})
        await until(lambda: not supervisor.link.num_open)
        return await reply.parts()

    parts = runner.run(late())
    assert len(parts) <= 70 and parts[-1].finish == "length" and parts[0].notes
    assert tokens(parts) == of_llm(llm, LONG | {"max_tokens": 200})[0].token_ids


async def loaded(supervisor: Supervisor, count: int = 40) -> list[EngineReply]:
    """So many requests, more than run at once, with some under way."""
    replies = [send(supervisor, LONG, SECRET) for _ in range(count)]
    await replies[0].parts()
    return replies


async def all_died(replies: list[EngineReply]) -> None:
    async def end(reply: EngineReply) -> None:
        with pytest.raises(EngineDied, match="try again"):
            while True:
                await asyncio.wait_for(reply.parts(), 30)

    await asyncio.gather(*map(end, replies))


def check_report(supervisor: Supervisor, reason: str) -> dict[str, Any]:
    assert supervisor.last_crash is not None
    text = supervisor.last_crash.read_text()
    report: dict[str, Any] = json.loads(text)
    assert reason in report["reason"]
    assert supervisor.last_crash.stat().st_mode & 0o777 == 0o600
    assert not re.search(rf"{SECRET[0]}\D{{1,40}}{SECRET[1]}", text), "a report holds no prompt"
    rows = report["steps"][0]["rows"]
    assert rows and all(row["request"].startswith("test-") and row["context"] >= row["tokens"] >= 1 for row in rows)
    return report


async def works_again(supervisor: Supervisor, restarts: int) -> None:
    assert supervisor.link.state == "restarting" and not supervisor.healthy()[0]
    with pytest.raises(EngineUnready) as unready:
        send(supervisor, LONG)
    assert unready.value.retry_after >= 1
    await asyncio.wait_for(supervisor.ready(), 60)
    assert supervisor.link.restarts == restarts and supervisor.healthy() == (True, "ok")
    assert len(tokens((await text_of(supervisor, {"max_tokens": 5, "ignore_eos": True}))[0])) == 5


def test_killed_under_load_every_request_hears_of_it(runner: asyncio.Runner, supervisor: Supervisor) -> None:
    async def killing() -> None:
        before = supervisor.link.restarts
        replies = await loaded(supervisor)
        most = supervisor.link.facts["max_batch_size"]
        await until(lambda: stats(supervisor).get("requests_running") == most)
        assert supervisor._child is not None
        os.kill(supervisor._child.process.pid, signal.SIGKILL)
        await all_died(replies)
        report = check_report(supervisor, "killed by SIGKILL")
        assert (report["signal"], report["requests_open"]) == ("SIGKILL", 40)
        assert most // 2 < len(report["steps"][0]["rows"]) <= most
        await works_again(supervisor, before + 1)

    runner.run(killing())


def test_one_that_is_stopped_is_unhealthy_and_then_killed(runner: asyncio.Runner, supervisor: Supervisor) -> None:
    async def hanging() -> None:
        before = supervisor.link.restarts
        replies = await loaded(supervisor)
        assert supervisor._child is not None
        os.kill(supervisor._child.process.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        assert supervisor.healthy() == (True, "ok")
        assert not supervisor.healthy(stopped + 6)[0], "no beat for six seconds"
        supervisor._hang_timeout = 1.0
        await all_died(replies)
        supervisor._hang_timeout = 120.0
        assert 0.5 < time.monotonic() - stopped < 10
        check_report(supervisor, "it hung")
        await works_again(supervisor, before + 1)

    runner.run(hanging())


def test_garbage_ends_the_connection_and_with_it_the_process(runner: asyncio.Runner, supervisor: Supervisor) -> None:
    async def sending() -> None:
        before = supervisor.link.restarts
        replies = await loaded(supervisor)
        assert supervisor.link._transport is not None
        supervisor.link._transport.write(b"\x05\0\0\0hello")
        await all_died(replies)
        report = check_report(supervisor, "exit code 4")
        assert "not a message to the engine" in report["stderr"]
        assert supervisor.link.restarts == before + 1

    runner.run(sending())


PARENT = """
import asyncio, os, signal
from penstock.serve.supervisor import Supervisor

async def main():
    supervisor = Supervisor({"device": "cpu"})
    supervisor.start()
    await supervisor.ready()
    print(pid := supervisor._child.process.pid, flush=True)
    os.kill(pid, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_it_ends_with_its_parent_though_it_hangs() -> None:
    parent = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, timeout=60, check=False)
    pid = int(parent.stdout)
    end = time.monotonic() + 15
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        if (Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]) == "Z":
            return  # nobody is left to bury it
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
