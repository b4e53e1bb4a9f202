"""The engine within this process, behind the seam of the real one: for tests of what lies on the other side of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Any

from penstock import LLM, SamplingParams
from penstock.errors import PenstockError
from penstock.runtime.intake import Submission
from penstock.runtime.output import delta
from penstock.runtime.requests import CompletionOutput, RequestOutput
from penstock.serve.link import Reply, State
from penstock.serve.wire import Beat, Part, Submit, Times


class InProcess:
    """An `Engine` of the serving process over an LLM."""

    state: State = "ready"
    beat: Beat | None = None
    progress = ("ready", 1, 1)
    restarts = 0

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        engine = llm.engine
        limits = llm._loop.executor.scheduler.limits
        self.facts: dict[str, Any] = {
            "model": "bundled", "directory": str(llm.engine_dir), "vocab_size": engine.vocab_size,
            "max_seq_len": limits.max_seq_len, "dtype": "float32",
            "device": "cpu", "version": "0", "eos": [1, 4], "embeds": False, "generation": {},
        }  # fmt: skip
        self.submitted: list[Submit] = []
        self.aborted: list[tuple[str, int | None]] = []

    def healthy(self, now: float) -> tuple[bool, str]:
        return True, "steps move"

    def submit(self, new: Submit) -> Reply:
        self.submitted.append(new)
        return InProcessReply(self, new)


@dataclass
class InProcessReply:
    engine: InProcess
    new: Submit
    news: list[Part | PenstockError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.some = asyncio.Event()
        self.before: RequestOutput | None = None
        self.dropped: set[int] = set()
        self.ended: set[int] = set()
        self.loop = asyncio.get_running_loop()
        new = self.new
        asked = SamplingParams(**new.params)
        self.beams, self.width = asked.use_beam_search, asked.width
        self.scored = asked.logprobs is not None or asked.width > asked.n
        params = asked
        if not self.beams:
            params = replace(asked, n=asked.width, best_of=None)
            params = replace(params, logprobs=asked.logprobs if asked.width == asked.n else asked.logprobs or 0)
        submission = Submission(
            new.id, tuple(new.prompt), params, self._sink,
            streaming=not self.beams, priority=new.priority, cache_salt=new.cache_salt,
            queue_timeout=new.queue_timeout, timeout=new.timeout, arrival=new.arrival or time.monotonic(),
        )  # fmt: skip
        self.sent = self.loop.run_in_executor(None, self._send, submission)

    def _send(self, submission: Submission) -> None:
        try:
            self.engine.llm._loop.submit(submission)
        except PenstockError as error:
            self.loop.call_soon_threadsafe(self._hear, error)

    def _sink(self, output: RequestOutput | PenstockError) -> None:
        self.loop.call_soon_threadsafe(self._hear, output)

    def _hear(self, output: RequestOutput | PenstockError) -> None:
        if isinstance(output, PenstockError):
            self.news.append(output)
        else:
            first = self.before is None
            for each in delta(self.before, output).outputs:
                if each.index not in self.ended | self.dropped and (each.token_ids or each.finish_reason):
                    self.news.append(self._part(each, output, first))
            self.before = output
        self.some.set()

    def _part(self, new: CompletionOutput, output: RequestOutput, first: bool) -> Part:
        if new.finish_reason:
            self.ended.add(new.index)
        times = Times(output.metrics.arrival, reused_tokens=output.metrics.reused_tokens)
        stop = new.stop_reason if isinstance(new.stop_reason, int) else None
        return Part(
            self.new.id, new.index, list(new.token_ids), new.finish_reason, stop, new.finish_reason == "stop",
            [dict(each) for each in new.logprobs or ()] if self.scored else None,
            [None if each is None else dict(each) for each in output.prompt_logprobs]
            if first and new.index == 0 and output.prompt_logprobs is not None else None,
            new.score, times=times if new.finish_reason else None,
        )  # fmt: skip

    async def parts(self) -> list[Part]:
        found: list[Part] = []
        while not found:
            await self.some.wait()
            self.some.clear()
            for each in self.news:
                if isinstance(each, PenstockError):
                    raise each
                if each.index not in self.dropped:
                    found.append(each)
            self.news.clear()
        return found

    def abort(self, index: int | None = None) -> None:
        self.engine.aborted.append((self.new.id, index))
        self.dropped |= set(range(self.width)) if index is None else {index}
        if len(self.dropped | self.ended) >= self.width:
            self.loop.run_in_executor(None, self.engine.llm._loop.abort, self.new.id)
