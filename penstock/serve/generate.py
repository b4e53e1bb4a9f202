"""One request for text, from what it asks to the engine's answers: limits, deadlines, aborts."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from starlette.requests import Request

from penstock.errors import LengthError
from penstock.runtime.sampling.params import SamplingParams
from penstock.serve.choices import Usage
from penstock.serve.config import ServeConfig
from penstock.serve.errors import RequestError
from penstock.serve.schema.base import Sampling
from penstock.serve.serving import Serving
from penstock.serve.texts import Answer, Prompt, Text, wire_params
from penstock.serve.wire import Submit
from penstock.text import Tokenizer

News = Callable[[int, Answer, list[Text]], Awaitable[None]]


def check_limits(config: ServeConfig, prompts: int, params: SamplingParams) -> None:
    """Raises RequestError for more than the server gives to one request."""
    for name, value, most in (
        ("prompt", prompts, config.max_prompts),
        ("n", params.width, config.max_n),
        ("n", prompts * params.width, max(config.max_prompts, config.max_n)),
        ("stop", len(params.stop_strings), config.max_stop),
        ("logprobs", max(params.logprobs or 0, params.prompt_logprobs or 0), config.max_logprobs),
    ):
        if value > most:
            raise RequestError(400, f"{name}: {value} of one request, at most {most}; ask for less", None, name)


def check_length(length: int, most: int) -> None:
    """`most`: tokens of a request, of which one has to be left."""
    if length >= most:
        raise LengthError(f"the prompt has {length} tokens, the limit is {most - 1}; shorten it")


class Generation:
    """The answers to a request's prompts. Use as a context manager: what has not ended is aborted when it is left."""

    def __init__(
        self, serving: Serving, request: Request, body: Sampling, kind: str, model: str, prompts: Sequence[Prompt],
        params: SamplingParams, tokenizer: Tokenizer, grammar: bytes | None = None,
        shown: Collection[int] = (),
    ) -> None:  # fmt: skip
        """`shown`: as for Answer."""
        self.params, self.model = params, model
        self.id, self.created = f"{kind}-{secrets.token_hex(12)}", int(time.time())
        self.fingerprint = serving.fingerprint
        self._serving, self._tokenizer, self._body, self._grammar = serving, tokenizer, body, grammar
        self._shown = shown
        self._arrival = time.monotonic()
        self._prompts, self._stack, self._request = prompts, ExitStack(), request
        self.answers: list[Answer] = []

    def __enter__(self) -> Generation:
        with ExitStack() as stack:
            for i, prompt in enumerate(self._prompts):
                self.answers.append(stack.enter_context(self._sent(i, prompt)))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def usage(self) -> Usage:
        """Until now."""
        answers = self.answers
        cached = sum(answer.reused_tokens for answer in answers)
        prompt = sum(len(answer.prompt.tokens) for answer in answers)
        return Usage(prompt, sum(answer.num_tokens for answer in answers), min(cached, prompt))

    def common(self, kind: str) -> dict[str, Any]:
        """What an answer and each event of a stream begin with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    async def each(self, news: News) -> None:
        """Tell `news` of whatever grows, prompt by prompt, until all have ended. Raises the first error."""
        if len(self.answers) == 1:
            return await _follow(0, self.answers[0], news)
        try:
            async with asyncio.TaskGroup() as group:
                for i, answer in enumerate(self.answers):
                    group.create_task(_follow(i, answer, news))
        except* Exception as errors:
            raise first_error(errors) from None

    async def all(self) -> list[list[Text]]:
        """The chosen texts of each prompt. Raises the first error."""
        found: list[list[Text]] = [[] for _ in self.answers]

        async def wait(i: int, answer: Answer) -> None:
            found[i] = await answer.all()

        try:
            async with asyncio.TaskGroup() as group:
                for i, answer in enumerate(self.answers):
                    group.create_task(wait(i, answer))
        except* Exception as errors:
            raise first_error(errors) from None
        return found

    def _submit(self, number: int, prompt: Prompt) -> Submit:
        body, config = self._body, self._serving.config
        return Submit(
            self.id if len(self._prompts) == 1 else f"{self.id}-{number}", prompt.tokens, wire_params(self.params),
            self._arrival, body.priority, body.cache_salt or "",
            config.queue_timeout if body.queue_timeout is None else body.queue_timeout,
            config.timeout if body.timeout is None else body.timeout, self._grammar,
        )  # fmt: skip

    def _sent(self, number: int, prompt: Prompt) -> Answer:
        new, started = self._submit(number, prompt), self._serving.hooks.started
        reply, request = self._serving.link.submit(new), self._request
        watcher = None
        if started is not None:
            watcher = started(request.scope["state"]["request_id"], new, self.params.max_tokens, request.headers.raw)
        return Answer(reply, prompt, self.params, self._tokenizer, watcher, self._shown)


async def _follow(number: int, answer: Answer, news: News) -> None:
    while not answer.done:
        await news(number, answer, await answer.more())


def first_error(errors: BaseExceptionGroup[Exception]) -> Exception:
    found = errors.exceptions[0]
    return first_error(found) if isinstance(found, BaseExceptionGroup) else found
