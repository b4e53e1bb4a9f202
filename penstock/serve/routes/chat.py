"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from penstock.serve.answers import answer as answered
from penstock.serve.app import while_connected
from penstock.serve.body import read_json
from penstock.serve.choices import chat_logprobs, prompt_logprobs
from penstock.serve.errors import RequestError
from penstock.serve.generate import Generation, check_limits, grammar_of
from penstock.serve.prompts import chat_text, check_length, encode
from penstock.serve.reasoning import prompt_state
from penstock.serve.schema.chat import ChatChunk, ChatCompletion, ChatRequest
from penstock.serve.serving import Endpoint, Serving
from penstock.serve.speech import NOTHING, ROLE, Speech
from penstock.serve.sse import Chunks, Events, Stream
from penstock.serve.texts import Answer, Prompt, Scored, Text
from penstock.text.spelling import Spelling


async def chat(request: Request, serving: Serving) -> Response:
    """The handler."""
    body = await read_json(request, ChatRequest)
    model, most = serving.check_model(body.model), int(serving.link.facts["max_seq_len"])
    serving.check_text()
    check_limits(serving.config, 1, body.sampling(most))
    texts = await serving.texts()
    tools, manner = body.asked_tools(), texts.manner
    manner.check(tools)
    rendered = await while_connected(request, chat_text(texts, body))
    ids = (await encode(texts.tokenizer, [rendered], body.add_special_tokens, most))[0]
    check_length(len(ids), most)
    params, prompts = body.sampling(most - len(ids)), [Prompt(ids)]
    held = _held(body, manner.grammar(rendered, tools), manner.reasoning and prompt_state(rendered) == "open")
    grammar = await while_connected(request, grammar_of(held, params, serving))
    generation = Generation(
        serving, request, body, "chatcmpl", model, prompts, params, texts.tokenizer, grammar,
        manner.shown(texts.tokenizer),
    )  # fmt: skip
    form = _Form(body, generation, serving.spelling(texts.tokenizer), lambda: Speech(manner.parser(rendered, tools)))
    if body.stream:
        return Stream(serving, form.stream)
    return answered(await while_connected(request, form.whole()))


def _held(body: ChatRequest, calls: str | None, thinks: bool) -> dict[str, Any]:
    """What the text is held to, where calls may be required. `thinks`: it goes on with a thought."""
    held = body.guided()
    if held and thinks:
        raise RequestError(
            400, "the model's chat template begins with a thought, which a text held to a form has no end of; leave "
            "the form out, or the thought (with many templates by chat_template_kwargs enable_thinking=false)",
            "unsupported", "response_format",
        )  # fmt: skip
    if calls is None:
        return held
    if held:
        raise RequestError(
            400, "tool_choice requires a call, and the text is to have another form as well; ask for one of them",
            "invalid_value", "tool_choice",
        )  # fmt: skip
    return {"structural_tag": calls}


class _Form:
    """How one request's answer is written."""

    def __init__(
        self, body: ChatRequest, generation: Generation, spelling: Spelling, speech: Callable[[], Speech]
    ) -> None:
        self._body, self._generation, self._spelling, self._speech = body, generation, spelling, speech
        self._speeches: dict[int, Speech] = {}
        self._top = body.top_logprobs or 0
        self._usage, self._counts = body.counted.include_usage, body.counted.continuous_usage_stats

    async def whole(self) -> dict[str, Any]:
        with self._generation as generation:
            texts = await generation.all()
        found = generation.common("chat.completion")
        found["choices"] = [self._choice(i, text) for i, text in enumerate(texts[0])]
        found["usage"] = generation.usage.json()
        if (top := self._body.prompt_logprobs) is not None:
            found["prompt_logprobs"] = prompt_logprobs(generation.answers[0].prompt_logprobs or (), self._spelling, top)
        return found

    async def stream(self, events: Events) -> None:
        with self._generation as generation:
            chunks = Chunks(generation.common("chat.completion.chunk"), "delta", self._usage or self._counts)

            async def news(number: int, answer: Answer, grown: list[Text]) -> None:
                if written := b"".join([each for text in grown for each in self._events(text, chunks)]):
                    await events.write(written)

            await generation.each(news)
            if self._usage:
                await events.write(chunks.usage(generation.usage.json()))

    def _choice(self, index: int, text: Text) -> dict[str, Any]:
        speech, (said, scored) = self._speech(), text.read()
        message = speech.message(said)
        finish, stop_reason = speech.finish(text)
        found = {"index": index, "message": message, "logprobs": self._scored(scored)}
        return found | {"finish_reason": finish, "stop_reason": stop_reason}

    def _events(self, text: Text, chunks: Chunks) -> list[bytes]:
        """Of all that is new of a text: its role first, why it ended last."""
        index, (said, scored) = text.index, text.read()
        pieces = [] if index in self._speeches else [ROLE]
        speech = self._speeches.setdefault(index, self._speech()) if pieces else self._speeches[index]
        pieces += speech.pieces(said, text.finish is not None)
        logprobs = self._scored(scored) if scored else None
        usage = self._generation.usage.json() if self._counts else None
        if logprobs is not None and pieces[-1:] in ([], [ROLE]):
            pieces.append(NOTHING)
        written = [chunks.choice(index, piece, usage=usage) for piece in pieces[:-1]]
        written += [chunks.choice(index, piece, logprobs, usage=usage) for piece in pieces[-1:]]
        if text.finish is not None:
            written.append(chunks.choice(index, NOTHING, None, *speech.finish(text), usage))
        return written

    def _scored(self, scored: list[Scored]) -> dict[str, Any] | None:
        return chat_logprobs(scored, self._spelling, self._top) if self._body.logprobs else None


ROUTES: Final = (
    Endpoint(
        "POST", "/v1/chat/completions", chat, "Go on with a conversation.", ChatRequest, ChatCompletion,
        (404, 429, 500), streams=ChatChunk,
    ),
)  # fmt: skip
