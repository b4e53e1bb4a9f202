"""The official client: every answer validates against its own types, and every error is one that it knows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.cpu.serve.asking import app_on
from tests.cpu.serve.real import RealEngine

ASK: Any = [{"role": "user", "content": "What is a lion?"}]
TOOL: Any = {"type": "function", "function": {"name": "look_up", "parameters": {
    "type": "object", "properties": {"word": {"const": "lion"}}, "required": ["word"],
    "additionalProperties": False}}}  # fmt: skip
Calls = Callable[[openai.AsyncOpenAI], Awaitable[None]]


def with_client(engine: RealEngine, calls: Calls, key: str = "none", **config: Any) -> None:
    async def run() -> None:
        app, _ = app_on(engine, **config)
        http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(app))
        async with openai.AsyncOpenAI(base_url="http://served/v1", api_key=key, http_client=http, max_retries=0) as one:
            await calls(one)

    engine.run(run)


def valid(kind: Any, found: Any) -> Any:
    """What came, validated; the client itself builds its objects without a look. A stream's choices have no reason to
    end yet, and an echoed prompt's first token no probability, which OpenAI's own do not say either."""
    data = found.to_dict()
    if kind is Completion:
        for choice in data["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
            if rows := choice["logprobs"]:
                rows["token_logprobs"] = [each or 0.0 for each in rows["token_logprobs"]]
                rows["top_logprobs"] = [each or {} for each in rows["top_logprobs"]]
    assert found.id and found.created and found.model == "bundled" and found.system_fingerprint.startswith("fp_")
    return kind.model_validate(data)


COMPLETIONS: list[dict[str, Any]] = [
    {}, {"n": 2, "logprobs": 2}, {"echo": True, "logprobs": 1, "max_tokens": 1}, {"stop": ["line"], "max_tokens": 40},
    {"temperature": 1.0, "seed": 1, "top_p": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.5, "user": "me",
     "logit_bias": {"300": 1}}, {"extra_body": {"top_k": 5, "use_beam_search": False, "min_tokens": 2}},
]  # fmt: skip


def test_completions(engine: RealEngine) -> None:
    async def calls(client: openai.AsyncOpenAI) -> None:
        for asked in COMPLETIONS:
            given: dict[str, Any] = {
                "model": "bundled",
                "prompt": "In the beginning",
                "max_tokens": 8,
                "seed": 1,
                **asked,
            }
            whole = valid(Completion, await client.completions.create(**given))
            assert len(whole.choices) == asked.get("n", 1) and whole.usage.completion_tokens
            text = dict.fromkeys(range(len(whole.choices)), "")
            usage = None
            async for event in await client.completions.create(
                **given, stream=True, stream_options={"include_usage": True}
            ):
                for choice in valid(Completion, event).choices:
                    text[choice.index] += choice.text
                usage = event.usage or usage
            assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens
            assert text == {choice.index: choice.text for choice in whole.choices}

    with_client(engine, calls)


CHATS: list[dict[str, Any]] = [
    {}, {"n": 2, "logprobs": True, "top_logprobs": 2}, {"logprobs": True}, {"max_completion_tokens": 5, "stop": "a"},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": 1}}}},
    {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 120},
    {"tools": [TOOL], "tool_choice": "auto"},
]  # fmt: skip


def test_chats(engine: RealEngine) -> None:
    async def calls(client: openai.AsyncOpenAI) -> None:
        for asked in CHATS:
            most = {} if "max_completion_tokens" in asked else {"max_tokens": 8}
            given: dict[str, Any] = {"model": "bundled", "messages": ASK, "seed": 1, **most, **asked}
            whole = valid(ChatCompletion, await client.chat.completions.create(**given))
            assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
            assert whole.usage.prompt_tokens_details is not None
            said = dict.fromkeys(range(asked.get("n", 1)), "")
            called = dict.fromkeys(said, "")
            reasons = dict[int, str]()
            async for event in await client.chat.completions.create(**given, stream=True):
                for choice in valid(ChatCompletionChunk, event).choices:
                    said[choice.index] += choice.delta.content or ""
                    for call in choice.delta.tool_calls or ():
                        called[choice.index] += call.function.arguments or ""
                    if choice.finish_reason:
                        reasons[choice.index] = choice.finish_reason
            for choice in whole.choices:
                assert said[choice.index] == (choice.message.content or "")
                assert reasons[choice.index] == choice.finish_reason
                calls_made = choice.message.tool_calls or []
                assert called[choice.index] == "".join(call.function.arguments for call in calls_made)
            assert (whole.choices[0].finish_reason == "tool_calls") == (asked.get("tool_choice") == "required")

    with_client(engine, calls, tool_call_parser="hermes")


def test_the_clients_own_stream_helper(engine: RealEngine) -> None:
    async def calls(client: openai.AsyncOpenAI) -> None:
        held = {"guided_choice": ["a lion"]}
        async with client.chat.completions.stream(model="bundled", messages=ASK, extra_body=held) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == "a lion"

    with_client(engine, calls)


def test_errors_are_the_clients(engine: RealEngine) -> None:
    async def calls(client: openai.AsyncOpenAI) -> None:
        for given in (
            {"prompt": "a", "temperature": 9e9},
            {"prompt": [10**6]},
            {"prompt": "a", "extra_body": {"x": 1}},
        ):
            with pytest.raises(openai.BadRequestError) as bad:
                await client.completions.create(model="bundled", **given)
            assert bad.value.body and bad.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError, match="1023") as long:
            await client.completions.create(model="bundled", prompt=[5] * 2000)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="other", messages=ASK)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.APIStatusError, match="408"):
            await client.completions.create(model="bundled", prompt="a", extra_body={"timeout": 1e-6})

    with_client(engine, calls)

    async def keyless(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.AuthenticationError):
            await client.completions.create(model="bundled", prompt="a")

    with_client(engine, keyless, key="wrong-key-1", api_keys=("right-key-1",))
