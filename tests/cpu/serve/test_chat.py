"""POST /v1/chat/completions over the bundled model."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from penstock import LLM, SamplingParams, bundled
from penstock.serve.schema.chat import ChatChunk, ChatCompletion
from penstock.serve.wire import Part
from penstock.text import ChatTemplate, Tokenizer
from tests.cpu.serve.asking import Ask, answer_of, ask_once, asking, events_of, streamed, told
from tests.cpu.serve.real import RealEngine
from tests.cpu.serve.test_texts import Script

TOKENIZER = Tokenizer.from_dir(bundled.target())
ASK = [{"role": "user", "content": "What is a lion?"}]
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {
    "type": "object", "properties": {"word": {"enum": ["lion", "lamb"]}}, "required": ["word"],
    "additionalProperties": False}}}  # fmt: skip
PATH = "chat/completions"


def rendered(*messages: dict[str, Any], begins: bool = True) -> list[int]:
    template = ChatTemplate.from_dir(bundled.target())
    assert template is not None
    return TOKENIZER.encode(template.render(messages, begins), add_special_tokens=False)


def test_an_answer_is_what_the_library_says_behind_the_template(engine: RealEngine, llm: LLM) -> None:
    found = answer_of(engine, PATH, messages=ASK, temperature=0, max_tokens=24, n=2)
    ChatCompletion.model_validate(found)
    params = SamplingParams(temperature=0.0, max_tokens=24)
    expected = llm.generate({"prompt_token_ids": rendered(*ASK)}, params)[0].outputs[0]
    assert [c["message"]["content"] for c in found["choices"]] == [expected.text] * 2
    assert found["choices"][0]["finish_reason"] == expected.finish_reason
    assert found["usage"]["prompt_tokens"] == len(rendered(*ASK))


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(engine: RealEngine) -> None:
    asked: dict[str, Any] = {"messages": ASK, "temperature": 0, "max_tokens": 12, "n": 2}
    whole = answer_of(engine, PATH, **asked)
    *events, last = streamed(engine, PATH, **asked, stream_options={"include_usage": True})
    for event in [*events, last]:
        ChatChunk.model_validate(event)
    assert last["usage"] == whole["usage"] | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}
    for choice in whole["choices"]:
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""} and own[-1]["delta"] == {}
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]


def test_logprobs_have_tokens_bytes_and_the_likeliest(engine: RealEngine) -> None:
    asked: dict[str, Any] = {"messages": ASK, "temperature": 0, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    choice = answer_of(engine, PATH, **asked)["choices"][0]
    rows = choice["logprobs"]["content"]
    assert bytes(b for row in rows for b in row["bytes"]).decode() == choice["message"]["content"]
    assert all(len(row["top_logprobs"]) == 2 and row["top_logprobs"][0]["token"] == row["token"] for row in rows)
    events = streamed(engine, PATH, **asked)
    assert [row for e in events for row in (e["choices"][0]["logprobs"] or {"content": []})["content"]] == rows


def test_an_answer_has_the_room_that_is_left_unless_it_says_less(engine: RealEngine) -> None:
    long = [{"role": "user", "content": "lion " * 500}]
    assert 990 < len(rendered(*long)) < 1020
    found = answer_of(engine, PATH, messages=long, temperature=0, ignore_eos=True)
    assert found["usage"]["total_tokens"] == 1024 and found["choices"][0]["finish_reason"] == "length"
    short = answer_of(engine, PATH, messages=ASK, max_completion_tokens=3, ignore_eos=True)
    assert short["usage"]["completion_tokens"] == 3


def test_a_last_message_is_gone_on_with(engine: RealEngine, llm: LLM) -> None:
    begun = [*ASK, {"role": "assistant", "content": "A lion is "}]
    found = answer_of(engine, PATH, messages=begun, continue_final_message=True, temperature=0, max_tokens=6)
    ids = rendered(*begun, begins=False)[:-1]  # its end
    expected = llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0.0, max_tokens=6))[0].outputs[0]
    assert found["choices"][0]["message"]["content"] == expected.text
    assert found["usage"]["prompt_tokens"] == len(ids)


def test_parts_of_text_are_joined_and_every_role_is_taken(engine: RealEngine) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "a lion?"}]
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "lion"}'}}
    said: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short."}, {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "A cat."},
        {"role": "assistant", "content": "A cat.", "reasoning_content": "Well."},
    ]  # fmt: skip
    found = answer_of(engine, PATH, messages=said, max_tokens=1)
    plain = [{**each, "content": each["content"] or ""} for each in said]
    plain[2]["content"] = "What is\na lion?"
    assert found["usage"]["prompt_tokens"] == len(rendered(*plain))


USER = {"role": "user", "content": "a"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"), ({"messages": []}, "messages"), ({"messages": "a"}, "messages"),
    ({"messages": [{"role": "king", "content": "a"}]}, "role"), ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "tool_call_id"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]}, "image_url"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [
        {"id": "a", "function": {"name": "a", "arguments": "{}"}}]}]}, "tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "a", "arguments": "["}}]}]},
     "arguments"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"id": "a", "function": {"name": "a", "arguments": "[" * 100_000}}]}]}, "arguments"),
    ({"messages": [USER], "chat_template": "{{ 1 }}"}, "chat_template"),
    ({"messages": [USER], "chat_template_kwargs": {"messages": []}}, "messages"),
    ({"messages": [USER], "chat_template_kwargs": {"template": "default"}}, "template"),
    ({"messages": [USER], "chat_template_kwargs": {"a": "x" * 100_000}}, "chat_template_kwargs"),
    ({"messages": [USER], "chat_template_kwargs": {f"a{i}": 1 for i in range(99)}}, "chat_template_kwargs"),
    ({"messages": [USER], "add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt"),
    ({"messages": [USER], "top_logprobs": 2}, "top_logprobs"), ({"messages": [USER], "logprobs": 2}, "logprobs"),
    ({"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    ({"messages": [USER], "functions": []}, "functions"), ({"messages": [USER], "store": True}, "store"),
    ({"messages": [USER], "modalities": ["audio"]}, "modalities"), ({"messages": [USER] * 10_001}, "messages"),
    ({"messages": [{"role": "user", "content": "x y " * 5000}]}, "tokens"),
    ({"messages": [{"role": "user", "content": "x" * 300_000}]}, "tokens"),
    ({"messages": [USER], "tools": [TOOL]}, "tools"), ({"messages": [USER], "tool_choice": "required"}, "tool_choice"),
    ({"messages": [USER], "n": 200}, "n"), ({"messages": [USER], "response_format": {"type": "yaml"}}, "type"),
    ({"messages": [USER], "guided_regex": "(", "max_tokens": 5}, "regex"),
    ({"messages": [USER], "guided_json": {"type": "string", "colour": 1}}, "colour"),
]  # fmt: skip


def test_what_is_wrong_is_refused_by_name_and_the_next_request_runs(engine: RealEngine) -> None:
    async def work(ask: Ask) -> None:
        for body, name in WRONG:
            response = await asyncio.wait_for(ask(PATH, **body), 10)
            assert response.status_code == 400, (str(body)[:200], response.text)
            assert name in response.json()["error"]["message"], (str(body)[:100], response.text)
            assert len(response.content) < 2500
        assert (await ask(PATH, messages=ASK, max_tokens=2)).status_code == 200

    asking(engine, work)


FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"guided_choice": ["lion", "lamb"]}, lambda text: text in ("lion", "lamb")),
    ({"guided_regex": "[0-9]{3}-[a-c]"}, lambda text: len(text) == 5 and text[:3].isdigit()),
    ({"structured_outputs": {"choice": ["yes"]}}, lambda text: text == "yes"),
    ({"guided_grammar": 'root ::= "a" | "b"'}, lambda text: text in "ab"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}}}},
     lambda text: json.loads(text)["a"] in (1, 2)),
    ({"guided_json": {"type": "boolean"}}, lambda text: isinstance(json.loads(text), bool)),
]  # fmt: skip


def test_texts_are_held_to_forms_and_calls_are_made_where_required(engine: RealEngine) -> None:
    async def work(ask: Ask) -> None:
        for form, fits in FORMS:
            found = (await ask(PATH, messages=ASK, max_tokens=40, seed=1, **form)).json()
            assert fits(found["choices"][0]["message"]["content"]), (form, found)
        assert (await ask("completions", prompt="a", guided_choice=["b"])).json()["choices"][0]["text"] == "b"
        for choice in ("required", {"type": "function", "function": {"name": "look_up"}}):
            asked: dict[str, Any] = {"messages": ASK, "tools": [TOOL], "tool_choice": choice, "max_tokens": 200}
            asked |= {"parallel_tool_calls": False, "temperature": 0}
            choice = (await ask(PATH, **asked)).json()["choices"][0]
            assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
            (call,) = choice["message"]["tool_calls"]
            assert call["function"]["name"] == "look_up"
            assert json.loads(call["function"]["arguments"])["word"] in ("lion", "lamb")
            events = events_of((await ask(PATH, stream=True, **asked)).text)
            deltas = [c for e in events for c in e["choices"][0]["delta"].get("tool_calls", ())]
            assert deltas[0]["id"] and deltas[0]["function"]["name"] == "look_up"
            pieces = "".join(each["function"]["arguments"] for each in deltas)
            assert pieces == call["function"]["arguments"]
            assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"
            for event in events:
                ChatChunk.model_validate(event)
        clash = await ask(PATH, messages=ASK, tools=[TOOL], tool_choice="required", guided_regex="a")
        assert clash.status_code == 400 and clash.json()["error"]["param"] == "tool_choice"

    asking(engine, work, tool_call_parser="hermes")


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_and_calls_are_told_apart(engine: RealEngine, stream: bool) -> None:
    said = (
        'So <tool> hm.</think>\n\nLook: <tool_call>\n{"name": "look_up", "arguments": {"word": "lion"}}\n</tool_call>'
    )
    ids = TOKENIZER.encode("<think>" + said, add_special_tokens=False)
    replies = [Script([[Part("r", 0, [each])] for each in ids] + [[Part("r", 0, [4], "stop", ended_by_token=True)]])]
    body = {"messages": ASK, "tools": [TOOL], "stream": stream}
    response = told(engine, PATH, replies, body, tool_call_parser="hermes", reasoning_parser="qwen3")
    if not stream:
        choice = response.json()["choices"][0]
        ChatCompletion.model_validate(response.json())
        message = choice["message"]
        assert message["reasoning_content"] == message["reasoning"] == "So <tool> hm."
        assert message["content"].strip() == "Look:"
        (call,) = message["tool_calls"]
    else:
        events = events_of(response.text)
        deltas = [event["choices"][0]["delta"] for event in events]
        choice = events[-1]["choices"][0]
        assert "".join(d.get("reasoning_content", "") for d in deltas) == "So <tool> hm."
        assert "".join(d.get("content", "") for d in deltas).strip() == "Look:"
        calls = [call for d in deltas for call in d.get("tool_calls", ())]
        call = {"function": {"name": calls[0]["function"]["name"],
                             "arguments": "".join(each["function"]["arguments"] for each in calls)}}  # fmt: skip
    assert choice["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "look_up" and json.loads(call["function"]["arguments"]) == {"word": "lion"}


def test_a_model_without_a_template_says_what_to_do(engine: RealEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.text.ChatTemplate.from_dir", lambda path: None)
    response = ask_once(engine, PATH, messages=ASK)
    assert response.status_code == 400 and "/v1/completions" in response.json()["error"]["message"]


def test_a_template_that_cannot_take_the_messages_is_a_400(engine: RealEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ("{{ raise_exception('no kings') }}", "{{ 1 / 0 }}", "{% for i in range(10**9) %}x{% endfor %}"):
        template = ChatTemplate(source)
        monkeypatch.setattr("penstock.text.ChatTemplate.from_dir", lambda path, template=template: template)
        response = ask_once(engine, PATH, messages=ASK)
        assert response.status_code == 400 and "template" in response.json()["error"]["message"], response.text
