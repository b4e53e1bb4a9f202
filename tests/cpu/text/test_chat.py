"""Chat templates: the text of transformers, and no way out of the sandbox."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import PromptError, TokenizerError
from penstock.text import ChatTemplate, limits
from tests.cpu.text.conftest import byte_level, write

# In the manner of the published ones, each exercising what those exercise.
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'ipython' or 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{% endif %}
{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' ~ '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
QWEN3 = """{%- macro describe(tool, depth=0) -%}
  {{ '- %s: ' | format(tool.function.name) }}{{ tool | tojson }}
{%- endmacro %}
{%- set ns = namespace(last=-1, multi=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" %}{% set ns.multi = false %}{% set ns.last = index %}{% endif %}
{%- endfor %}
{%- if tools %}{% for tool in tools %}{{ describe(tool) }}
{% endfor %}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'skip' %}{% continue %}{% endif %}
    {%- set content = m.content or '' %}
    {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
    {%- generation %}
    {{ m.role ~ '@' ~ loop.index0 ~ '/' ~ ns.last }}: {{ content.replace('a', 'A') }}{% endgeneration %}
    {%- if loop.index0 > 3 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}
    {% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}
{{ messages | map(attribute='role') | join(', ') | indent(4) }}{{ eos_token }}{{ strftime_now('%Y')[:2] }}"""
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": " Be <brief> & 'kind'. "},
    {"role": "user", "content": "水は?\n  a"},
    {"role": "assistant", "content": "<think>hm</think>\n\nit flows"},
    {"role": "user", "content": "ok"},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_<weather>", "description": "d'é", "parameters": {"z": [1], "a": {}}}}
]
CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "x"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"b": "é", "a": 1}}}],
    },
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("source", [LLAMA3, CHATML, QWEN3], ids=["llama3", "chatml", "qwen3"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_is_that_of_transformers(
    tmp_path: Path, source: str, tools: list[dict[str, Any]] | None, prompt: bool
) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = write(tmp_path, byte_level(), tokenizer_config={**SPECIAL, "chat_template": source})
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), chat_template=source, bos_token="<s>", eos_token="</s>"
    )
    ours = ChatTemplate.from_dir(directory)
    assert ours is not None
    for messages in (MESSAGES, MESSAGES[1:2], *([CALL] if source is LLAMA3 else [])):
        for variables in ({}, {"enable_thinking": False}):
            assert ours.render(messages, prompt, tools, **variables) == theirs.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **variables
            )


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert ChatTemplate.from_dir(write(tmp_path, byte_level())) is None
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T{{ tools|length }}"}]
    template = ChatTemplate.from_dir(write(tmp_path, byte_level(), tokenizer_config={"chat_template": named}))
    assert template is not None
    assert template.render(MESSAGES) == "D"
    assert template.render(MESSAGES, tools=TOOLS) == "T1"
    assert template.render(MESSAGES, template="tool_use", tools=[]) == "T0"
    (tmp_path / "chat_template.jinja").write_text("J{{ eos_token }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    template = ChatTemplate.from_dir(tmp_path)
    assert template is not None
    assert template.render(MESSAGES) == "J"
    assert template.render(MESSAGES, template="rag") == "R"
    with pytest.raises(PromptError, match="no chat template is named 'x'; there are default, tool_use, rag"):
        template.render(MESSAGES, template="x")


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ messages.__class__.__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__code__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ '{0.__class__.__init__}'.format(messages) }}",
    "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% include 'x' %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_there_is_no_way_out(source: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(TokenizerError, match="chat template 'default' failed"):
        ChatTemplate(source).render(messages)
    assert messages == [{"role": "user", "content": "x"}]


RUNAWAYS = [
    "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "{% for a in range(90000) %}{% for b in range(90000) if false %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in range(90000) %}{{ 'aaaaaaaaaa' * 10000 }}{% endfor %}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ [1] * 10 ** 9 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ 'a'|center(1000000000) }}",
    "{{ [1]|batch(1000000000, 2)|list }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d'|format(1000000000, 1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ messages|tojson(indent=1000000000) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).join(range(90000)) }}",
    "{{ range(90000)|join('a' * 100000) }}",
    "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{{ lipsum(1000000) }}",
    "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x={'a': 1}) %}{% for i in range(60) %}{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}"
    "{{ n.x|tojson }}",
    "{% set n = namespace(x=('a',)) %}{% for i in range(60) %}{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x == n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + [n.x] + [n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x]|list + [n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "{% set n = namespace() %}{% set n.x = [n, n] %}{{ n }}",
    "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set m = namespace(a=n.x, b=n.x) %}{% set n.x = m %}"
    "{% endfor %}{{ n.x|string }}",
    "{% set n = namespace(x=1) %}{% for i in range(60) %}{% set m = namespace(a=n.x, b=n.x) %}{% set n.x = m %}"
    "{% endfor %}{% macro f() %}{{ varargs }}{% endmacro %}{{ f(n.x) }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(9000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x|tojson }}",
    "{% set n = namespace(x=[]) %}{% for i in range(9000) %}{% set n.x = [n.x, 'a' * 9000000] %}{% endfor %}",
    "{% set n = namespace(x=[]) %}{% for i in range(90) %}"
    "{% set n.x = [n.x, ('ab' * 1000000).split('b')] %}{% endfor %}",
    "{% set a = 'ab' * 4000000 %}" + "{% set b = a[1:] %}" * 2000,
    "{% set a = [0] * 999999 %}{% set b = [0] * 999999 %}" + "{{ a == b }}" * 2000,
    "{{ ([('a' * 1000000)] * 100000)|join }}",
    "{{ ([{'x': 'a' * 1000000}] * 100000)|join(attribute='x') }}",
    "{{ ''.join([('a' * 1000000)] * 100000) }}",
    "{{ ('<>' * 5000000)|striptags }}",
    "{{ ('a' * 16000000).strip('b' * 1000000) }}",
    "{{ ('a' * 16000000)|trim('b' * 1000000) }}",
    "{{ ('\n' * 16000000)|indent('a' * 1000000) }}",
    "{{ ('\n' * 1000000)|indent(900) }}",
    "{{ 'a'.encode().ljust(10 ** 10) }}",
    "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x % 7 }}",
    "{{ ('f' * 16000000)|int(base=16) // 7 }}",
    "{{ 1.5|round(10 ** 9, 'ceil') }}",
    "{{ ([[0] * 10000] * 10000)|sum(start=[]) }}",
    "{{ ([range(99999)] * 1000000)|map('sum')|sum }}",
    "{{ range(99999)|select('in', [1, 0] * 400000)|list }}",
    "{{ ('ab' * 8000000)|sort }}",
    "{{ ('%s' * 100000) % (('a' * 1000000,) * 100000) }}",
    "{{ ('%(a)s' * 100000) % {'a': 'a' * 1000000} }}",
    "{{ ('{a}' * 100000).format(a='a' * 1000000) }}",
    "{{ ([[1, 2]] * 100000)|tojson(indent=900) }}",
    "{{ [1, 2]|tojson(separators=('a' * 10000000, 'b')) }}",
    "{{ strftime_now('%999999999d') }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% macro a() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    "{% macro f(n) %}{% call a() %}{{ f(n - 1) if n else '' }}{% endcall %}{% endmacro %}{{ f(60) }}",
]


@pytest.mark.parametrize("source", RUNAWAYS)
def test_a_runaway_ends(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.5)
    begin = time.monotonic()
    with pytest.raises(TokenizerError):
        ChatTemplate(source).render(MESSAGES)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("source", [
    "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}", "{{ " + "[" * 30_000 + "]" * 30_000 + " }}",
    "{% if a %}" * 4_000 + "{% endif %}" * 4_000, "{% for a in b %}" * 60 + "{% endfor %}" * 60,
    "{{ a" + ".a" * 45_000 + " }}", "{{ " + "not " * 22_000 + "1 }}", "{{ 1" + "+1" * 45_000 + " }}",
    "{{ a" + "|e" * 45_000 + " }}", "{{ " + "-" * 45_000 + "1 }}", "{{ 1" + "~1" * 45_000 + " }}", "{{a}}" * 19_000,
])  # fmt: skip
def test_a_hostile_source_ends(source: str) -> None:
    """Compiled and rendered, or a typed error; in bounded time."""
    begin = time.monotonic()
    with contextlib.suppress(TokenizerError):
        ChatTemplate(source).render(MESSAGES)
    assert time.monotonic() - begin < 20


def test_each_rendering_has_its_own_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_STEPS", 100)
    template = ChatTemplate("{% for i in range(n) %}.{% endfor %}")
    for _ in range(5):
        assert template.render(MESSAGES, n=99) == "." * 99  # and the call of range
    with pytest.raises(TokenizerError, match="more than 100 loop turns"):
        template.render(MESSAGES, n=100)


def test_the_template_may_refuse_and_that_is_the_callers_error() -> None:
    with pytest.raises(PromptError, match="refuses these messages: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(MESSAGES)


@pytest.mark.parametrize("messages", [[], "hi", {"role": "user"}, ["hi"], [{"content": "x"}], [{"role": 1}]])
def test_malformed_messages_are_the_callers_error(messages: Any) -> None:
    with pytest.raises(PromptError, match="role"):
        ChatTemplate("x").render(messages)


def test_a_variable_cannot_hide_the_templates_own() -> None:
    with pytest.raises(PromptError, match="'raise_exception' is set by the server"):
        ChatTemplate("x").render(MESSAGES, raise_exception=str)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% generation %}x", "x" * 100_001])
def test_a_broken_template_is_a_typed_error(source: str) -> None:
    with pytest.raises(TokenizerError, match="cannot be compiled"):
        ChatTemplate(source)


@pytest.mark.parametrize("value", [7, [{"name": "default"}], ["x"], {"default": 3}])
def test_a_template_of_another_form_is_a_typed_error(tmp_path: Path, value: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(TokenizerError, match="it must be a string, or a list"):
        ChatTemplate.from_dir(tmp_path)
