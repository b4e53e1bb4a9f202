"""Chat templates in the manner of each family: the text that is published for it, and transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from penstock.errors import PromptError
from penstock.text import ChatTemplate
from tests.cpu.text.conftest import byte_level, write

MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{% endif %}{% for message in messages %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
CHATGLM = """{% for message in messages %}{% if loop.first %}[gMASK]sop{% endif %}<|{{ message['role'] }}|>
 {{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
PHI3 = """{% for message in messages %}{% if message['role'] in ['system', 'user'] %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
COMMAND_R = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}{% elif false == true %}
{% set loop_messages = messages %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}
{% if system_message != false %}
{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}{% endif %}
{% for message in loop_messages %}{% set content = message['content'] %}
{% if message['role'] == 'user' %}
{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{% elif message['role'] == 'assistant' %}
{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""
# Macros that call each other, namespaces, tests of kinds, defaults, and the date.
GPT_OSS = """{%- macro typescript(param, required=false) -%}
    {%- if param.type == "array" -%}
        {{- typescript(param['items'] | default({'type': 'any'})) + "[]" -}}
    {%- elif param.type is defined and param.type is iterable and param.type is not string -%}
        {{- param.type | join(" | ") -}}
    {%- elif param.enum -%}
        {{- '"' + param.enum | join('" | "') + '"' -}}
    {%- else -%}
        {{- {"integer": "number", "object": "object"}.get(param.type, param.type) -}}
    {%- endif -%}
    {%- if not required and param.nullable %} | null{% endif -%}
{%- endmacro -%}
{%- macro namespaced(name, tools) -%}
    {{- "## " + name + "\\n\\nnamespace " + name + " {\\n\\n" }}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- "// " + tool.description + "\\ntype " + tool.name + " = (_: {\\n" }}
        {%- for key, value in tool.parameters.properties.items() %}
            {%- set optional = "" if key in (tool.parameters.required or []) else "?" %}
            {{- key + optional + ": " + typescript(value) }}{{ ",\\n" if not loop.last else "\\n" }}
        {%- endfor %}
        {{- "}) => any;\\n\\n" }}
    {%- endfor %}
    {{- "} // namespace " + name }}
{%- endmacro -%}
{%- set ns = namespace(last_call=none, seen=[]) %}
{{- "<|start|>system<|message|>Current date: " + strftime_now("%Y-%m-%d")[:2] }}
{{- "\\nReasoning: " + (reasoning_effort or "medium") }}
{%- if builtin_tools is defined and builtin_tools is not none %}{{ builtin_tools | length }}{% endif %}
{{- "<|end|>" }}
{%- if tools %}
{{- "<|start|>developer<|message|># Tools\\n\\n" + namespaced("functions", tools) + "<|end|>" }}{% endif %}
{%- for message in messages -%}
    {%- if message.role == 'assistant' and 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {%- set ns.last_call = call.name %}
        {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
        {{- call.arguments | tojson }}{{- "<|call|>" }}
    {%- elif message.role == 'tool' %}
        {%- if ns.last_call is none %}{{ raise_exception("a tool's answer before a call") }}{% endif %}
        {{- "<|start|>functions." + ns.last_call + " to=assistant<|message|>" + message.content | tojson + "<|end|>" }}
    {%- elif loop.last and not add_generation_prompt %}{{- message.content }}
    {%- else %}{%- set ns.seen = ns.seen + [message.role] %}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}{{ ns.seen | length }}"""

SYSTEM = {"role": "system", "content": "S"}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Bye"},
]  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object",
     "required": ["a"], "properties": {
         "a": {"type": "array", "items": {"type": "integer"}}, "b": {"type": ["string", "null"]},
         "c": {"enum": ["x", "y"]},
     }}}},
]  # fmt: skip
CALLS: list[dict[str, Any]] = [
    TALK[0],
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1]}}}]},
    {"role": "tool", "content": "é\n"},
]  # fmt: skip
EXPECTED = {
    "mistral": (MISTRAL, "<s>[INST] Hi  [/INST]\nYo</s>\n[INST] Bye [/INST]\n"),
    "gemma": (GEMMA, "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n"
                     "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"),
    "chatglm": (CHATGLM, "[gMASK]sop<|user|>\n Hi <|assistant|>\n Yo<|user|>\n Bye<|assistant|>"),
    "phi3": (PHI3, "<|user|>\nHi <|end|>\n<|assistant|>\nYo<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n"),
    "command-r": (COMMAND_R, "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi<|END_OF_TURN_TOKEN|>"
                  "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>Yo<|END_OF_TURN_TOKEN|>"
                  "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Bye<|END_OF_TURN_TOKEN|>"
                  "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
    "gpt-oss": (GPT_OSS, "<|start|>system<|message|>Current date: 20\nReasoning: medium<|end|>"
                "<|start|>user<|message|>Hi <|end|><|start|>assistant<|message|>Yo<|end|>"
                "<|start|>user<|message|>Bye<|end|><|start|>assistant3"),
}  # fmt: skip


def squeezed(text: str) -> str:
    """Line breaks between the statements of our abridged templates are not the point."""
    return text.replace("\n", "")


@pytest.mark.parametrize("family", EXPECTED)
def test_the_text_is_the_published_one_and_that_of_transformers(family: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    source, expected = EXPECTED[family]
    directory = write(tmp_path, byte_level(), tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    (directory / "chat_template.jinja").write_text(source)
    ours = ChatTemplate.from_dir(directory)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    assert ours is not None
    assert squeezed(ours.render(TALK)) == squeezed(expected)
    takes_system = family not in ("mistral", "gemma")
    talks = [
        TALK,
        TALK[:1],
        TALK[:2],
        *([[SYSTEM, *TALK]] if takes_system else []),
        *([CALLS] if family == "gpt-oss" else []),
    ]
    for talk in talks:
        for prompt in (True, False):
            for tools in (None, TOOLS):
                text = theirs.apply_chat_template(talk, tools=tools, tokenize=False, add_generation_prompt=prompt)
                assert ours.render(talk, prompt, tools) == text


@pytest.mark.parametrize(("family", "talk", "message"), [
    ("gemma", [SYSTEM, *TALK], "System role not supported"), ("mistral", TALK[1:], "roles must alternate"),
    ("mistral", [TALK[0], SYSTEM], "Only user and assistant roles"), ("gpt-oss", CALLS[2:], "before a call"),
])  # fmt: skip
def test_what_a_family_refuses_is_the_callers_error(family: str, talk: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        ChatTemplate(EXPECTED[family][0], {"bos_token": "<s>", "eos_token": "</s>"}).render(talk)
