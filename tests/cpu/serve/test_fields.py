"""Every field that OpenAI's client can send is known: it does something, or asks for nothing, or is refused by name."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import ChatCompletionMessage, ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as chat

from penstock.errors import OptionError
from penstock.serve.body import Body, parse
from penstock.serve.config import ServeConfig
from penstock.serve.errors import RequestError, refusal
from penstock.serve.generate import check_limits
from penstock.serve.schema.base import StreamOptions
from penstock.serve.schema.chat import ChatRequest, Message
from penstock.serve.schema.completions import CompletionRequest
from penstock.serve.schema.embeddings import EmbeddingRequest

CHAT: Any = {"messages": [{"role": "user", "content": "a"}]}
CLIENTS: list[tuple[Any, type[Body]]] = [
    (chat.CompletionCreateParamsBase, ChatRequest),
    (completion_create_params.CompletionCreateParamsBase, CompletionRequest),
    (embedding_create_params.EmbeddingCreateParams, EmbeddingRequest),
    (ChatCompletionStreamOptionsParam, StreamOptions),
]
LABELS: dict[str, Any] = {
    "user": "me", "safety_identifier": "me", "prompt_cache_key": "k", "metadata": {"a": "b"}, "store": False,
    "service_tier": "auto",
}  # fmt: skip
NEUTRAL: dict[str, Any] = {
    "verbosity": "medium", "prompt_cache_retention": "in_memory", "echo": False, "include_reasoning": True,
    "return_token_ids": False, "return_tokens_as_token_ids": False, "spaces_between_special_tokens": True,
    "top_logprobs": 0, "parallel_tool_calls": True, "tools": [], "top_k": -1, "modalities": ["text"],
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "store": True, "service_tier": "flex", "verbosity": "low", "prompt_cache_retention": "24h", "echo": True,
    "include_reasoning": False, "return_token_ids": True, "return_tokens_as_token_ids": True,
    "spaces_between_special_tokens": False, "functions": [], "function_call": "auto", "audio": {"voice": "a"},
    "prediction": {"type": "content", "content": "a"}, "web_search_options": {}, "reasoning_effort": "low",
    "moderation": {}, "prompt_cache_options": {}, "documents": [], "chat_template": "{{ 1 }}",
    "mm_processor_kwargs": {}, "allowed_token_ids": [1], "guided_decoding_backend": "xgrammar", "request_id": "a",
    "guided_whitespace_pattern": " ", "kv_transfer_params": {}, "logits_processors": ["a"],
    "truncate_prompt_tokens": 5,
}  # fmt: skip


def read(**fields: Any) -> ChatRequest:
    return parse(json.dumps(CHAT | fields).encode(), ChatRequest)


@pytest.mark.parametrize(("client", "model"), CLIENTS, ids=lambda each: each.__name__)
def test_every_field_of_the_client_is_known(client: Any, model: type[Body]) -> None:
    assert not get_type_hints(client).keys() - model.model_fields.keys()


def test_what_asks_for_nothing_is_taken() -> None:
    plain = read().sampling(10)
    assert read(**LABELS, **NEUTRAL).sampling(10) == plain.__class__(max_tokens=10, top_k=-1)
    assert read(**dict.fromkeys(REFUSED)).sampling(10) == plain
    parse(json.dumps({"prompt": "a", **LABELS}).encode(), CompletionRequest)
    read(stream=True, stream_options={"include_obfuscation": False})


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_by_name_with_what_to_do(name: str) -> None:
    with pytest.raises(RequestError) as error:
        read(**{name: REFUSED[name]})
    told = refusal(error.value)
    assert told.status == 400 and told.param == name
    assert told.message.startswith(f"{name}: is not taken here; ") and len(told.message) < 200


@pytest.mark.parametrize(
    ("fields", "code", "param", "says"),
    [
        ({"top_q": 1}, "unknown_parameter", "top_q", "unknown field 'top_q', did you mean 'top_p'?"),
        ({"return_token": 1}, "unknown_parameter", "return_token", "unknown field 'return_token'"),  # _ids is refused
        ({"zzz": 1, "temperature": "a"}, "invalid_value", "temperature", "temperature: "),
        ({"messages": None}, "invalid_value", "messages", "messages: "),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options", "stream_options goes with"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs", "top_logprobs goes with"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", "max_tokens", "max_tokens and max_comp"),
    ],
)
def test_what_is_wrong_has_a_code_and_a_field(fields: dict[str, Any], code: str, param: str, says: str) -> None:
    with pytest.raises(RequestError) as error:
        read(**fields)
    told = refusal(error.value)
    assert (told.status, told.code, told.param) == (400, code, param)
    assert told.message.startswith(says) and ("did you mean" in says or "did you mean" not in told.message)


def test_what_is_missing_has_a_code() -> None:
    with pytest.raises(RequestError) as error:
        parse(b"{}", ChatRequest)
    assert (error.value.code, error.value.param) == ("missing_required_parameter", "messages")


def test_the_servers_limits_rule_and_have_limits_themselves() -> None:
    found = read(stop=["a"] * 17, logprobs=True, top_logprobs=32).sampling(10)
    with pytest.raises(RequestError, match="stop: 17 of one request, at most 16"):
        check_limits(ServeConfig(max_logprobs=32), 1, found)
    check_limits(ServeConfig(max_stop=17, max_logprobs=32), 1, found)
    for name, most in (("max_stop", 128), ("max_logprobs", 32), ("max_n", 1024)):
        highest: dict[str, Any] = {name: most}
        above: dict[str, Any] = {name: most + 1}
        ServeConfig(**highest)
        with pytest.raises(OptionError, match=f"give at most {most}"):
            ServeConfig(**above)


def test_false_is_no_zero() -> None:
    for name in ("store", "echo", "return_token_ids"):
        with pytest.raises(RequestError):
            read(**{name: 0})


def test_an_answer_goes_back_as_the_client_has_it() -> None:
    said = ChatCompletionMessage(role="assistant", content="a").model_dump()
    assert {"annotations", "audio", "function_call", "refusal"} <= said.keys()
    assert Message.model_validate(said).plain() == {"role": "assistant", "content": "a"}
