"""Tool calls out of a model's text: each style, however the text is cut, and texts that are no calls."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.serve.tools.events import Call, Event, Parser, append, gather
from penstock.serve.tools.parser import STYLES, StyleName

NAMES = ("get_weather", "f")
H_ARGS = '{"city": "Köln", "n": [1, -2.5e3, null]}'
H_CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {H_ARGS}}}\n</tool_call>'
L_CALL = '{"name": "f", "parameters": {"a": {"b": "}{\\"\\\\"}}}'
M_LIST = '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "f", "arguments": {}}]'


def parser(style: StyleName) -> Parser:
    count = itertools.count()
    return STYLES[style](NAMES, lambda: f"id{next(count)}")


def events_of(parser: Parser, pieces: list[str]) -> list[Event]:
    """Pieces of one thing joined, so that only what was said is compared, not how it was cut."""
    said: list[Event] = []
    for event in [e for piece in pieces for e in parser.feed(piece)] + parser.finish():
        append(said, event)
    return said


def parse(style: StyleName, text: str) -> tuple[str, list[tuple[str, str]]]:
    message = gather(events_of(parser(style), [text]))
    return message.content, [(call.name, call.arguments) for call in message.calls]


@pytest.mark.parametrize(
    ("style", "text", "content", "calls"),
    [
        ("hermes", H_CALL, "", [("get_weather", H_ARGS)]),
        ("hermes", f"Let me see.\n{H_CALL}\n{H_CALL}\n", "Let me see.", [("get_weather", H_ARGS)] * 2),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call> done', "done", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        ("llama3_json", L_CALL, "", [("f", '{"a": {"b": "}{\\"\\\\"}}')]),
        ("llama3_json", f" {L_CALL}; {L_CALL}", "", [("f", '{"a": {"b": "}{\\"\\\\"}}')] * 2),
        ("llama3_json", f"Hm. <|python_tag|>{L_CALL}", "Hm.", [("f", '{"a": {"b": "}{\\"\\\\"}}')]),
        ("llama3_json", '{"type": "function", "name": "f", "parameters": null}', "", [("f", "{}")]),
        ("mistral", M_LIST, "", [("f", '{"a": 1}'), ("f", "{}")]),
        ("mistral", 'Yes.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f{}', "Yes.", [("f", '{"a": 1}'), ("f", "{}")]),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]abc123def[ARGS] {"a": 1}', "", [("f", '{"a": 1}')]),
        ("mistral", '[TOOL_CALLS] {"name": "f", "arguments": {}}', "", [("f", "{}")]),
    ],
)
def test_a_call_is_read(style: StyleName, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parse(style, text) == (content, calls)


NO_CALLS = {
    "hermes": [
        "plain",
        " space kept \n",
        "<tool_call>",
        "a <tool_cal",
        "</tool_call>",
        "<tool_call> none </tool_call>",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "cut of',
        "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>',
        '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}, "parameters": {}}</tool_call>',
        '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 01}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": tru}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\n"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\u12x4"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": ' + "[" * 200 + "]" * 200 + "}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": ' + "1" * 500 + "}}</tool_call>",
        '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>',
    ],
    "llama3_json": ['{"answer": 42}', "{", '{"name": "f", "parameters": {', "<|python_tag|>print(1)", f"So: {L_CALL}"],
    "mistral": [
        "[TOOL_CALLS]",
        "[TOOL_CALLS][[",
        "[TOOL_CALLS] no call",
        "[TOOL_CALLS]g[ARGS]{}",
        "[TOOL_CALLS]f[ARGS]{",
        "[TOOL_CALLS]" + "x" * 300 + "{}",
    ],
}


@pytest.mark.parametrize(("style", "text"), [(style, text) for style, texts in NO_CALLS.items() for text in texts])
def test_what_is_no_call_is_content(style: StyleName, text: str) -> None:
    assert parse(style, text) == (text, [])


def test_behind_a_broken_call_the_next_is_read() -> None:
    broken = '<tool_call>{"name": "f", "arguments": {oops '
    assert parse("hermes", broken + H_CALL) == (broken.rstrip(), [("get_weather", H_ARGS)])


def test_arguments_come_as_they_are_written() -> None:
    reader = parser("hermes")
    told = [reader.feed(piece) for piece in ['<tool_call>{"name": "f", "arg', 'uments": {"a": "x', "yz", '"}}']]
    assert [str(events) for events in told] == [
        "[]",
        """[CallStart(index=0, id='id0', name='f'), Arguments(index=0, text='{"a": "x')]""",
        "[Arguments(index=0, text='yz')]",
        """[Arguments(index=0, text='"}')]""",
    ]


_PIECES = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<tool", "<", "[", "]"),
    *("{", "}", ";", ",", ":", '"', " ", "\n", "\\", "text", "f", "1.5", "true", '"name"', '"arguments"', '"f"'),
    *('"name": "f", ', '"arguments": ', '"parameters": ', "{}", '{"a": "b\\n"}', H_CALL, L_CALL, M_LIST),
    *('{"name": "f", "arguments": {', '{"name": "g", "arguments": {}}', '{"arguments": {"x": [1]}, "name": "f"}'),
]


@st.composite
def cut_texts(draw: st.DrawFn) -> list[str]:
    text = "".join(draw(st.lists(st.sampled_from(_PIECES), max_size=14)))
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


@pytest.mark.parametrize("style", list(STYLES))
@given(pieces=cut_texts())
def test_any_cutting_says_the_same(style: StyleName, pieces: list[str]) -> None:
    text = "".join(pieces)
    whole = events_of(parser(style), [text])
    assert events_of(parser(style), pieces) == whole
    assert events_of(parser(style), list(text)) == whole
    message = gather(whole)
    for call in message.calls:
        assert isinstance(json.loads(call.arguments), dict)
    if not message.calls:
        assert message.content == text


@pytest.mark.parametrize(
    "text",
    [
        '[TOOL_CALLS] [{"name": "g", "arguments": {"s": "[TOOL_CALLS]f{}"}}]',
        '[TOOL_CALLS] [{"[TOOL_CALLS]f{}' + "k" * 450 + '": 1}]',
        '[TOOL_CALLS] [{"name": "f", "arguments": {"n": ' + "1" * 450 + "[TOOL_CALLS]f{}}}]",
    ],
)
def test_a_fault_is_found_at_the_same_character(text: str) -> None:
    assert events_of(parser("mistral"), list(text)) == events_of(parser("mistral"), [text])


HOSTILE = {
    "begins": "<tool_call>{<|python_tag|>{[TOOL_CALLS][",
    "objects": '<tool_call>{"name": "f", "arguments": {x[TOOL_CALLS]f{x<|python_tag|>{"name": "f", "parameters": {x',
    "braces": "{",
    "brackets": "[TOOL_CALLS] [",
    "spaces": "\n",
    "quotes": '"\\',
    "less": "<",
    "names": '<tool_call>{"name": "' + "f" * 50,
}


@pytest.mark.parametrize("style", list(STYLES))
@pytest.mark.parametrize("kind", list(HOSTILE))
@pytest.mark.parametrize("head", ["", '<tool_call>{"name": "f", "arguments": {"a": "', '[TOOL_CALLS]f{"a": [', L_CALL])
def test_time_is_linear(style: StyleName, kind: str, head: str) -> None:
    text = head + HOSTILE[kind] * (20_000 // len(HOSTILE[kind]))
    for size in (len(text), 5):
        started = time.process_time()
        events_of(parser(style), [text[i : i + size] for i in range(0, len(text), size)])
        assert time.process_time() - started < 1


def test_ids_are_each_styles() -> None:
    calls: list[Call] = []
    for reader, text in ((STYLES["hermes"](NAMES), H_CALL), (STYLES["mistral"](NAMES), M_LIST)):
        calls += gather(reader.feed(text) + reader.finish()).calls
    assert calls[0].id.startswith("call_") and len({call.id for call in calls}) == 3
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls[1:])
