"""One request for text, from what it asks to the engine's answers: limits, deadlines, aborts."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, TypeVar

from starlette.requests import Request

from penstock.grammar import GuidedDecoding
from penstock.grammar.compiled import Compiled
from penstock.runtime.sampling.params import SamplingParams
from penstock.serve.choices import Usage
from penstock.serve.config import ServeConfig
from penstock.serve.errors import RequestError
from penstock.serve.schema.base import Sampling
from penstock.serve.schema.embeddings import EmbeddingRequest
from penstock.serve.serving import Serving
from penstock.serve.texts import Answer, Prompt, Text, wire_params
from penstock.serve.wire import Submit
from penstock.text import Tokenizer

T = TypeVar("T")
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
            raise RequestError(
                400, f"{name}: {value} of one request, at most {most}; ask for less", "invalid_value", name
            )


def admission(body: Sampling | EmbeddingRequest, config: ServeConfig) -> tuple[int, str, float | None, float | None]:
    """Priority, cache salt, queue timeout and timeout, as Submit has them."""
    queued = config.queue_timeout if body.queue_timeout is None else body.queue_timeout
    return body.priority, body.cache_salt or "", queued, config.timeout if body.timeout is None else body.timeout


def has_deadline(body: Sampling | EmbeddingRequest) -> bool:
    """One of its own."""
    return body.timeout is not None or body.queue_timeout is not None


async def grammar_of(asked: dict[str, Any], params: SamplingParams, serving: Serving) -> Compiled | None:
    """The compiled grammar of GuidedDecoding's arguments; None where nothing is asked.

    Raises SamplingError for what cannot be compiled, or cannot be where the text may not end by itself.
    """
    if not asked:
        return None
    guided = GuidedDecoding(**asked)
    params.refuse_ends()
    return await (await serving.grammars()).compile(guided)


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What each gives, in their order. The first error ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except* Exception as errors:
        raise _first(errors) from None
    return [task.result() for task in tasks]


def _first(errors: BaseExceptionGroup[Exception]) -> Exception:
    found = errors.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


class Generation:
    """The answers to a request's prompts. Use as a context manager: what has not ended is aborted when it is left."""

    def __init__(
        self, serving: Serving, request: Request, body: Sampling, kind: str, model: str, prompts: Sequence[Prompt],
        params: SamplingParams, tokenizer: Tokenizer, grammar: Compiled | None = None,
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
        await together(_follow(i, answer, news) for i, answer in enumerate(self.answers))

    async def all(self) -> list[list[Text]]:
        """The chosen texts of each prompt. Raises the first error."""
        return await together(answer.all() for answer in self.answers)

    def _submit(self, number: int, prompt: Prompt) -> Submit:
        id = self.id if len(self._prompts) == 1 else f"{self.id}-{number}"
        limits = admission(self._body, self._serving.config)
        key = self._grammar.key if self._grammar is not None else None
        return Submit(id, prompt.tokens, wire_params(self.params), self._arrival, *limits, key)

    def _sent(self, number: int, prompt: Prompt) -> Answer:
        new = self._submit(number, prompt)
        reply, watcher = self._serving.submit(self._request, new, self.params.max_tokens, self._grammar)
        return Answer(reply, prompt, self.params, self._tokenizer, watcher, self._shown, has_deadline(self._body))


async def _follow(number: int, answer: Answer, news: News) -> None:
    while not answer.done:
        await news(number, answer, await answer.more())
