"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from penstock.serve.answers import answer as answered
from penstock.serve.answers import to_json
from penstock.serve.app import while_connected
from penstock.serve.body import read_json
from penstock.serve.choices import Usage, completion_logprobs, prompt_logprobs
from penstock.serve.generate import Generation, check_limits, grammar_of
from penstock.serve.prompts import prompt_ids
from penstock.serve.schema.completions import Completion, CompletionRequest
from penstock.serve.serving import Endpoint, Serving
from penstock.serve.sse import Chunks, Events, Stream
from penstock.serve.texts import Answer, Prompt, Scored, Text, scored_prompt
from penstock.text import Tokenizer
from penstock.text.spelling import Spelling

_KIND: Final = "text_completion"


async def complete(request: Request, serving: Serving) -> Response:
    """The handler."""
    body = await read_json(request, CompletionRequest)
    model, params = serving.check_model(body.model), body.sampling()
    serving.check_text()
    check_limits(serving.config, len(body.prompts), params)
    tokenizer = (await serving.texts()).tokenizer
    prompts = await _prompts(body, tokenizer, serving.link.facts)
    grammar = await while_connected(request, grammar_of(body.guided(), params, serving))
    generation = Generation(serving, request, body, "cmpl", model, prompts, params, tokenizer, grammar)
    form = _Form(body, generation, serving.spelling(tokenizer), tokenizer)
    if body.stream:
        return Stream(serving, form.stream)
    return answered(await while_connected(request, form.whole()))


async def _prompts(body: CompletionRequest, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> list[Prompt]:
    given, skip = body.prompts, body.skip_special_tokens is not False
    ids = await prompt_ids(given, body.add_special_tokens is not False, tokenizer, facts)
    if not body.echo:
        return [Prompt(each) for each in ids]
    said = [each if isinstance(each, str) else tokenizer.decode(each, skip) for each in given]
    return [Prompt(each, text) for each, text in zip(ids, said, strict=True)]


class _Form:
    """How one request's answer is written."""

    def __init__(
        self, body: CompletionRequest, generation: Generation, spelling: Spelling, tokenizer: Tokenizer
    ) -> None:
        self._body, self._generation, self._spelling, self._tokenizer = body, generation, spelling, tokenizer
        self._wanted = body.max_tokens != 0  # else the prompt alone is
        self._begun: set[int] = set()  # texts whose echo is written
        self._usage, self._counts = body.counted.include_usage, body.counted.continuous_usage_stats

    async def whole(self) -> dict[str, Any]:
        with self._generation as generation:
            texts = await generation.all()
        choices = [
            self._choice(number * generation.params.n + i, answer, text)
            for number, (answer, found) in enumerate(zip(generation.answers, texts, strict=True))
            for i, text in enumerate(found)
        ]
        return generation.common(_KIND) | {"choices": choices, "usage": self._used().json()}

    async def stream(self, events: Events) -> None:
        with self._generation as generation:
            chunks = Chunks(generation.common(_KIND), "text", self._usage or self._counts)

            async def news(number: int, answer: Answer, grown: list[Text]) -> None:
                if written := self._news(number, answer, grown, chunks):
                    await events.write(written)

            await generation.each(news)
            if self._usage:
                await events.write(chunks.usage(self._used().json()))

    def _news(self, number: int, answer: Answer, grown: list[Text], chunks: Chunks) -> bytes:
        echoes = bool(self._body.echo)
        if echoes and self._body.logprobs is not None:
            if answer.prompt_logprobs is None:  # which come with the first text, and all begin with
                return b""
            if number * self._generation.params.n not in self._begun:
                grown = answer.texts
        usage = self._used().json() if self._counts else None
        written: list[bytes] = []
        for text in grown:
            index = number * self._generation.params.n + text.index
            said, logprobs = self._said(answer, text, echoes and index not in self._begun)
            self._begun.add(index)
            if said or logprobs or text.finish:
                finish = self._finish(text)
                written.append(chunks.choice(index, to_json(said), logprobs, *finish, usage))
        return b"".join(written)

    def _choice(self, index: int, answer: Answer, text: Text) -> dict[str, Any]:
        said, logprobs = self._said(answer, text, bool(self._body.echo))
        finish, stop_reason = self._finish(text)
        found = {"index": index, "text": said, "logprobs": logprobs}
        found |= {"finish_reason": finish, "stop_reason": stop_reason}
        if (top := self._body.prompt_logprobs) is not None:
            found["prompt_logprobs"] = prompt_logprobs(answer.prompt_logprobs or (), self._spelling, top)
        return found

    def _said(self, answer: Answer, text: Text, echo: bool) -> tuple[str, dict[str, Any] | None]:
        """What is new of a text, behind its prompt where that is echoed."""
        said, scored = text.read() if self._wanted else ("", [])
        behind = len(answer.prompt.text)
        top = self._body.logprobs
        if top is None or not (scored or echo):
            return answer.prompt.text + said if echo else said, None
        found = completion_logprobs(scored, self._spelling, top, behind)
        if not echo:
            return said, found
        before = self._before(answer, top)
        return answer.prompt.text + said, {name: before[name] + found[name] for name in before}

    def _before(self, answer: Answer, top: int) -> dict[str, Any]:
        scored: Sequence[Scored] = scored_prompt(answer, self._tokenizer)
        return completion_logprobs(scored, self._spelling, top)

    def _finish(self, text: Text) -> tuple[str | None, str | int | None]:
        return (text.finish, text.stop_reason) if self._wanted or text.finish is None else ("length", None)

    def _used(self) -> Usage:
        found = self._generation.usage
        return found if self._wanted else Usage(found.prompt, 0, found.cached)


ROUTES: Final = (
    Endpoint(
        "POST", "/v1/completions", complete, "Go on with a text.", CompletionRequest, Completion,
        (404, 429, 500), streams=Completion,
    ),
)  # fmt: skip
