"""Many requests through a running model: batched in flight, as they arrive, in batches that wait, or beside long
prompts; with what each step and each request took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from penstock.bench.requests import Asked
from penstock.bench.workload import prompt
from penstock.errors import ExecutorError, OptionError
from penstock.llm import LLM
from penstock.runtime.loop import Gather
from penstock.runtime.requests import RequestOutput, SamplingParams
from penstock.runtime.steplog import LoggedStep, StepLog

Request = tuple[Sequence[int], int]  # a prompt, and the tokens to generate
Waits = tuple[tuple[float, int], ...]  # seconds between two tokens, and how many requests waited so long
IDLE_STEPS = 200  # steps of running requests alone that are looked at before prompts come beside them
LONG_PROMPTS = 8  # that then come, one after another
RUNNING_PROMPT = 128  # tokens of the prompts of those that run
PATIENCE = 300.0  # seconds that they may take to get there


@dataclass(frozen=True)
class Flow:
    """A run of requests: `seconds` from the first one's arrival to the last one's end; `waits`: between tokens of
    running requests; `host_us`: CPU time of the executor's thread for a step, device's waits left out."""

    seconds: float
    outputs: tuple[RequestOutput, ...]
    steps: tuple[LoggedStep, ...]
    waits: Waits
    waste: float
    host_us: float
    preemptions: int

    @property
    def prompt_tokens(self) -> int:
        return sum(len(each.prompt_token_ids) for each in self.outputs)

    @property
    def output_tokens(self) -> int:
        return sum(len(each.outputs[0].token_ids) for each in self.outputs)

    @property
    def reused_tokens(self) -> int:
        return sum(each.metrics.reused_tokens for each in self.outputs)

    @property
    def first_tokens(self) -> tuple[float, ...]:
        """Seconds."""
        return tuple(each.metrics.time_to_first_token or 0.0 for each in self.outputs)

    @property
    def latencies(self) -> tuple[float, ...]:
        """Seconds from arrival to the end."""
        return tuple(each.metrics.latency or 0.0 for each in self.outputs)

    @property
    def busy(self) -> float:
        """Share of the time in which the device ran a step."""
        return sum(step.busy for step in self.steps) / self.seconds

    @property
    def rows(self) -> float:
        """The mean of all steps."""
        return sum(step.rows for step in self.steps) / max(1, len(self.steps))


def mixed(llm: LLM, requests: Sequence[Request]) -> float:
    """All requests at once: output tokens / time."""
    return sum(new for _, new in requests) / _seconds(llm, requests)


def static(llm: LLM, requests: Sequence[Request], batch: int) -> float:
    """The same requests in batches, each of which waits for its longest before the next begins.

    Rows that have ended are not computed any more: kinder than a runtime that pads them to the end.
    """
    batches = [requests[i : i + batch] for i in range(0, len(requests), batch)]
    return sum(new for _, new in requests) / sum(_seconds(llm, part) for part in batches)


def _seconds(llm: LLM, requests: Sequence[Request]) -> float:
    start = time.perf_counter()
    llm.generate(*_calls(requests))
    return time.perf_counter() - start


def _calls(requests: Sequence[Request]) -> tuple[list[dict[str, Sequence[int]]], list[SamplingParams]]:
    return [{"prompt_token_ids": ids} for ids, _ in requests], [_params(new) for _, new in requests]


def _params(new: int) -> SamplingParams:
    return SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0, detokenize=False)


def flow(llm: LLM, requests: Sequence[Asked]) -> Flow:
    """Each request at its time, and all that can be told of it."""
    with logged(llm) as log:
        before, start = llm.stats(), time.monotonic()
        if any(each.arrival for each in requests):
            outputs = _as_they_come(llm, requests)
        else:
            outputs = llm.generate(*_calls([(each.prompt, each.new) for each in requests]))
        seconds, after = time.monotonic() - start, llm.stats()
    spent, steps, preempted = (after[x] - before[x] for x in ("host_seconds", "host_steps", "preemptions"))
    waste = sum(log.waste) / max(1, len(log.waste))
    host_us = 1e6 * spent / max(1, steps)
    return Flow(seconds, tuple(outputs), tuple(log.steps), waits(log.steps), waste, host_us, int(preempted))


@contextmanager
def logged(llm: LLM) -> Iterator[StepLog]:
    """The steps of a model that is at rest, until it is at rest again."""
    loop, log = llm._loop, StepLog()
    loop.call(lambda: log.attach(loop.executor))
    try:
        yield log
    finally:
        while loop.call(lambda: loop.executor.busy):  # raises what the loop died of
            time.sleep(0.001)
        loop.call(log.detach)


def waits(steps: Sequence[LoggedStep]) -> Waits:
    """A request that decodes in a step had its token before from the step before: of one that lacked a block, or was
    preempted, only the last step counts. Steps that failed gave no token."""
    read = [step for step in steps if step.read]
    return tuple((step.read - before.read, step.learnt) for before, step in pairwise(read) if step.learnt)


def quantile(found: Waits, q: float) -> float:
    """Of the seconds between two tokens, each counted as often as it was waited."""
    left = q / 100 * (sum(count for _, count in found) - 1)
    for seconds, count in sorted(found):
        left -= count
        if left < 0:
            return seconds
    return 0.0


def _as_they_come(llm: LLM, requests: Sequence[Asked]) -> list[RequestOutput]:
    """Each at its arrival, whatever runs then."""
    loop, gather, start = llm._loop, Gather(len(requests)), time.monotonic()
    ids = []
    try:
        for each in requests:
            time.sleep(max(0.0, start + each.arrival - time.monotonic()))
            ids.append(_submit(llm, each.prompt, each.new, gather.put))
        gather.wait()
    finally:
        if left := [x for x in ids if x not in gather.outputs]:
            loop.abort(*left)
    return [gather.outputs[x] for x in ids]


def _submit(llm: LLM, ids: Sequence[int], new: int, put: Any) -> str:
    """Without waiting for a step to end; the request's id."""
    loop = llm._loop
    order = loop.executor.prepare(llm._submission({"prompt_token_ids": ids}, _params(new), put))
    loop.post(lambda: loop.executor.submit(order), put)
    return order.id


def interrupted(llm: LLM, running: int, length: int, longest: int, vocab: int) -> tuple[Waits, Waits]:
    """What `running` requests wait for their tokens, alone and then while prompts of one length come, one after
    another. Those that run may become `longest` tokens long.

    Raises OptionError where they end before the last prompt has been computed.
    """
    with logged(llm) as log:
        gather = Gather(running)
        prompts = [prompt(RUNNING_PROMPT, i, vocab) for i in range(running)]
        ids = [_submit(llm, each, longest - RUNNING_PROMPT, gather.put) for each in prompts]
        try:
            _until_settled(log, running)
            first = len(log.steps)
            for i in range(LONG_PROMPTS):
                llm.generate({"prompt_token_ids": prompt(length, running + i, vocab)}, _params(1))
            last = len(log.steps)
            if gather.outputs:
                raise OptionError(
                    f"requests of {longest} tokens ended before {LONG_PROMPTS} prompts of {length} had been computed "
                    f"beside them; raise max_seq_len or lower --input_len"
                )
        finally:
            llm._loop.abort(*ids)
    alone = waits(log.steps[first - IDLE_STEPS - 1 : first])
    return alone, waits(log.steps[first - 1 : last])


def _until_settled(log: StepLog, running: int) -> None:
    """So many steps of all of them alone have begun."""
    end = time.monotonic() + PATIENCE
    while sum(step.decoding == running for step in tuple(log.steps)) < IDLE_STEPS + 2:
        if time.monotonic() > end:
            raise ExecutorError(f"{running} requests took no {IDLE_STEPS} steps in {PATIENCE:.0f} s; run fewer")
        time.sleep(0.005)
