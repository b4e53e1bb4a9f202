"""What a request may say of tools; which style a template is of; calls that are required."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from penstock.bundled import target
from penstock.errors import OptionError, SamplingError
from penstock.grammar import GuidedDecoding
from penstock.grammar.schema import checked_tag
from penstock.serve.errors import RequestError
from penstock.serve.tools.events import gather
from penstock.serve.tools.manner import Manner, detect_tools
from penstock.serve.tools.schema import Tooled, Tools
from penstock.text import ChatTemplate, Tokenizer
from penstock.text.detokenize import IncrementalDetokenizer

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "maxLength": 10}},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "time")]


def asked(choice: Any = "required", **more: Any) -> Tools:
    tools = Tooled.model_validate({"tools": TOOLS, "tool_choice": choice, **more}).asked_tools()
    assert tools is not None
    return tools


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ("{{ '<tool_call>\\n{\"name\": ' ~ call.name ~ ', \"arguments\": ' }}", "hermes"),
        ("<tool_call><function={{ name }}><parameter=arguments>", "none"),
        ("<tool_call>{{ name }}<arg_key>{{ arguments }}</arg_key>", "none"),
        ('<|eot_id|>{"name": "{{ name }}", "parameters": {{ arguments }}}', "llama3_json"),
        ('{"name": "{{ name }}", "parameters": {{ arguments }}}', "none"),
        ("[TOOL_CALLS] [{{ calls }}]", "mistral"),
        ("{{ messages }}", "none"),
    ],
)
def test_style_is_detected(template: str, style: str) -> None:
    assert detect_tools(template) == style


def test_a_stated_style_counts() -> None:
    template = ChatTemplate({"default": "</think>", "tool_use": "[TOOL_CALLS]name[ARGS]"})
    assert Manner.of(template) == Manner("mistral", True, compact=True)
    assert Manner.of(template, "hermes", "none") == Manner("hermes", False, compact=True)
    assert Manner.of(None) == Manner("none", False)
    with pytest.raises(OptionError, match="tool_call_parser='llama9'"):
        Manner.of(template, "llama9")


def test_tools_of_an_unknown_style_are_refused() -> None:
    with pytest.raises(RequestError, match="tool_call_parser"):
        Manner("none", False).check(asked())
    Manner("none", False).check(None)


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"tools": [*TOOLS, TOOLS[0]]}, "two are named 'weather'"),
        ({"tools": [{"type": "retrieval"}]}, "function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]}, "object"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "body": 1}}]}, "body"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": _deep(90)}}]}, "levels deep"),
        ({"tools": [{"type": "function", "function": {"name": "a", "description": "x" * 300_000}}]}, "at most 262144"),
        ({"tools": TOOLS * 65}, "128"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "there is no tool 'g'"),
        ({"tool_choice": "required"}, "there are no tools"),
    ],
)
def test_bad_tools_are_refused(body: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Tooled.model_validate(body)


def test_what_is_asked() -> None:
    assert Tooled.model_validate({"tools": TOOLS, "tool_choice": "none"}).asked_tools() is None
    assert Tooled.model_validate({"tools": []}).asked_tools() is None
    assert asked("auto").required == () and asked("auto").parallel
    assert asked().required == ("weather", "time") and not asked(parallel_tool_calls=False).parallel
    named = asked({"type": "function", "function": {"name": "time"}})
    assert named.required == ("time",) and not named.parallel and named.plain == TOOLS


MANNERS = [
    Manner("hermes", False),
    Manner("llama3_json", False),
    Manner("mistral", False),
    Manner("mistral", False, compact=True),
    Manner("hermes", True),
]


@pytest.mark.parametrize("manner", MANNERS, ids=str)
@pytest.mark.parametrize("prompt", ["assistant\n", "assistant\n<think>\n"])
def test_a_required_call_is_one_that_the_parser_reads(manner: Manner, prompt: str) -> None:
    tools = asked()
    matcher = _matcher(manner.grammar(prompt, tools))
    calls = [("weather", '{"city": "Bonn", "days": 2}'), ("time", '{"city": "Köln"}')]
    text = _written(manner, calls)
    if manner.reasoning:
        text = ("hm </b></think>\n\n" if "<think>" in prompt else "<think>hm</think>") + text
    assert matcher.accept_string(text) and matcher.accept_token(256)
    parser = manner.parser(prompt, tools)
    message = gather(parser.feed(text) + parser.finish())
    assert [(call.name, call.arguments) for call in message.calls] == calls and not message.content


@pytest.mark.parametrize("manner", MANNERS, ids=str)
def test_nothing_else_is_one(manner: Manner) -> None:
    grammar = manner.grammar("", asked({"type": "function", "function": {"name": "time"}}))
    for calls in ([("weather", '{"city": "a"}')], [("time", '{"days": 1}')], [("time", '{"city": "a"}')] * 2, []):
        matcher = _matcher(grammar)
        assert not (matcher.accept_string(_written(manner, calls) or "Bonn") and matcher.accept_token(256))
    assert manner.grammar("", asked("auto")) is None and manner.grammar("", None) is None


STRICT = [{"type": "function", "function": {**each["function"], "strict": True}} for each in TOOLS]


@pytest.mark.parametrize("manner", [MANNERS[0], MANNERS[1], MANNERS[4]], ids=str)
def test_strict_tools_leave_text_free_and_calls_not(manner: Manner) -> None:
    tools = Tooled.model_validate({"tools": STRICT}).asked_tools()
    grammar = manner.grammar("", tools)
    good, bad = _written(manner, [("time", '{"city": "a"}')]), _written(manner, [("time", '{"days": 1}')])
    for text, fits in (("", True), ("Bonn, I {think}.\n", True), (good, True), (bad, False)):
        matcher = _matcher(grammar)
        assert (matcher.accept_string(text) and matcher.accept_token(256)) == fits
    with pytest.raises(RequestError, match="strict"):
        MANNERS[2].check(tools)


def _written(manner: Manner, calls: list[tuple[str, str]]) -> str:
    if manner.compact:
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
    key = "parameters" if manner.tools == "llama3_json" else "arguments"
    said = [f'{{"name": "{name}", "{key}": {arguments}}}' for name, arguments in calls]
    match manner.tools:
        case "hermes":
            return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in said)
        case "mistral":
            return f"[TOOL_CALLS] [{', '.join(said)}]"
        case _:
            return "; ".join(said)


def _matcher(grammar: str | None) -> Any:
    import xgrammar

    assert grammar is not None
    text = checked_tag(GuidedDecoding(structural_tag=grammar).text)
    tokens = [*(bytes([i]) for i in range(256)), b""]
    info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=257, stop_token_ids=[256])
    return xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info, max_threads=1).compile_structural_tag(text))


def test_schemas_of_tools_are_checked_before_they_are_compiled() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    tools = Tooled.model_validate({"tools": [tool], "tool_choice": "required"}).asked_tools()
    grammar = Manner("hermes", False).grammar("", tools)
    assert grammar is not None
    with pytest.raises(SamplingError, match="'not' cannot be enforced"):
        checked_tag(grammar)


def test_markers_that_are_special_tokens_are_shown(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(target())
    tokenizer.backend.add_special_tokens(["[TOOL_CALLS]", "<think>"])
    tokenizer = Tokenizer(tokenizer.backend)
    ids = tokenizer.encode("<|user|>[TOOL_CALLS]f{}<think>", add_special_tokens=False)
    shown = Manner("mistral", False).shown(tokenizer)
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=True, shown=shown)
    assert "".join(map(detokenizer.add, ids)) + detokenizer.finish() == "[TOOL_CALLS]f{}"
    assert len(Manner("none", True).shown(tokenizer)) == 1
