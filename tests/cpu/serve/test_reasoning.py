"""A thought in front of an answer, opened by the prompt or the text, and with tool calls behind it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.serve.reasoning import ReasoningParser, detect_reasoning
from penstock.serve.tools.events import Event, Message, append, gather
from penstock.serve.tools.parser import HermesParser

OPEN, CLOSED, NONE = (
    "<|im_start|>assistant\n<think>\n",
    "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "user: <think>?",
)
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def said(prompt: str, pieces: list[str]) -> list[Event]:
    parser = ReasoningParser(prompt, lambda: HermesParser(["f"], lambda: "id"))
    events: list[Event] = []
    for event in [e for piece in pieces for e in parser.feed(piece)] + parser.finish():
        append(events, event)
    return events


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content", "calls"),
    [
        (NONE, "<think>\nhm,\nso\n</think>\n\nAnswer.\n", "hm,\nso", "Answer.\n", 0),
        (OPEN, "hm\n</think>\n\nAnswer </think>", "hm", "Answer </think>", 0),
        (OPEN, "hm <think> again", "hm <think> again", "", 0),
        (CLOSED, "Answer </think> more", "", "Answer </think> more", 0),
        (CLOSED, "<think>said</think>", "", "<think>said</think>", 0),
        (NONE, " Answer <think>x", "", " Answer <think>x", 0),
        (NONE, "hm\n</think>\nAnswer", "hm", "Answer", 0),
        (NONE, "<think>\n\n</think>\n\nAnswer", "", "Answer", 0),
        (NONE, "<think>never ends </thi", "never ends </thi", "", 0),
        (NONE, "<thin", "", "<thin", 0),
        (NONE, " \n", "", " \n", 0),
        (OPEN, f"call\n</think>\n{CALL}", "call", "", 1),
        (NONE, f"<think>{CALL}</think>no", CALL, "no", 0),
        (NONE, f"first\n{CALL}</think>x", "", "first</think>x", 1),
        (NONE, f"a{CALL[:-30]}</think>{CALL}", f"a{CALL[:-30]}", "", 1),
    ],
)
def test_a_text_is_split(prompt: str, text: str, reasoning: str, content: str, calls: int) -> None:
    message = gather(said(prompt, [text]))
    assert (message.reasoning, message.content, len(message.calls)) == (reasoning, content, calls)


_PIECES = [
    "<think>",
    "</think>",
    "<",
    "</",
    "think>",
    " ",
    "\n",
    "text",
    CALL,
    "<tool_call>",
    CALL[:30],
    "</tool_call>",
]


@given(
    st.sampled_from([OPEN, CLOSED, NONE]),
    st.lists(st.sampled_from(_PIECES), max_size=10),
    st.lists(st.floats(0, 1), max_size=8),
)
def test_any_cutting_says_the_same(prompt: str, pieces: list[str], places: list[float]) -> None:
    text = "".join(pieces)
    cuts = [0, *sorted(int(place * len(text)) for place in places), len(text)]
    whole = said(prompt, [text])
    assert said(prompt, [text[a:b] for a, b in itertools.pairwise(cuts)]) == whole
    assert said(prompt, list(text)) == whole


def test_without_a_marker_nothing_is_held_back() -> None:
    parser = ReasoningParser()
    assert [len(parser.feed(piece)) for piece in ("Hello", " there", ", you")] == [1, 1, 1]
    assert gather(parser.finish()) == Message()


def test_style_is_what_the_template_speaks_of() -> None:
    assert detect_reasoning("{% if '</think>' in content %}{% endif %}") == "qwen3"
    assert detect_reasoning("{{ messages[0].content }}") == "none"
