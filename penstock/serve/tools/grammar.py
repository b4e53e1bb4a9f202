"""Where a call is required: the texts that are such calls in the model's own style, as a structural tag of xgrammar;
and where tools are strict: any texts, but with such calls alone.

Markers that are special tokens are spelt out there: no grammar may use a special token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from penstock.serve.reasoning import CLOSE, OPEN, prompt_state
from penstock.serve.tools.parser import StyleName
from penstock.serve.tools.schema import Tools

_SPACES: Final = 16  # that may stand between two tokens of JSON
_BEFORE: Final = {"hermes": "", "llama3_json": "", "mistral": "[TOOL_CALLS] ["}
_BEHIND: Final = {"hermes": "", "llama3_json": "", "mistral": "]"}
_BETWEEN: Final = {"hermes": "\n", "llama3_json": "; ", "mistral": ", "}
_AROUND: Final = {
    "hermes": ('<tool_call>\n{"name": %s, "arguments": ', "}\n</tool_call>"),
    "llama3_json": ('{"name": %s, "parameters": ', "}"),
    "mistral": ('{"name": %s, "arguments": ', "}"),
}
_NO_CALL: Final = r"([^{ \t\r\n](.|\n)*)?"  # of Llama's, whose calls begin the text
Format = dict[str, Any]
Schemas = Iterable[tuple[str, Mapping[str, Any]]]


def structural_tag(style: StyleName, tools: Tools, *, compact: bool = False, prompt: str | None = None) -> str:
    """One call or several of the required tools, each with arguments of its schema; none required: any text, with calls
    of which those of strict tools are held to their schemas, for hermes and llama3_json. compact: Mistral's
    `name[ARGS]{...}`. prompt: of a model that may think first, as rendered."""
    calls = [*_thought(prompt)] if prompt is not None else []
    if not tools.required:
        calls.append(_free(style, tools))
    elif compact and style == "mistral":
        calls.append(_compact(tools))
    else:
        calls += [_text(_BEFORE[style]), _listed(style, tools), _text(_BEHIND[style])]
    elements = [each for each in calls if each.get("value") != ""]
    return json.dumps({"type": "structural_tag", "format": {"type": "sequence", "elements": elements}})


def _listed(style: StyleName, tools: Tools) -> Format:
    return {
        "type": "tags_with_separator", "tags": _tags(style, _required(tools)), "separator": _BETWEEN[style],
        "at_least_one": True, "stop_after_first": not tools.parallel,
    }  # fmt: skip


def _tags(style: StyleName, schemas: Schemas) -> list[Format]:
    begin, end = _AROUND[style]
    return [
        {"type": "tag", "begin": begin % json.dumps(name), "content": _arguments(schema), "end": end}
        for name, schema in schemas
    ]


def _free(style: StyleName, tools: Tools) -> Format:
    """Mistral's marker is a special token, without which no call would ever come."""
    assert style != "mistral"
    schemas = {name: schema if name in tools.strict else {} for name, schema in tools.schemas.items()}
    if style == "hermes":
        return {
            "type": "triggered_tags", "triggers": ["<tool_call>"], "tags": _tags(style, schemas.items()),
            "at_least_one": False, "stop_after_first": not tools.parallel,
        }  # fmt: skip
    calls = _listed(style, replace(tools, schemas=schemas, required=tuple(schemas)))
    return {"type": "or", "elements": [{"type": "regex", "pattern": _NO_CALL}, calls]}


def _compact(tools: Tools) -> Format:
    calls = [
        {"type": "sequence", "elements": [_text(f"[TOOL_CALLS]{name}[ARGS]"), _arguments(schema)]}
        for name, schema in _required(tools)
    ]
    call = {"type": "or", "elements": calls}
    return {"type": "plus", "content": call} if tools.parallel else call


def _required(tools: Tools) -> Schemas:
    return ((name, tools.schemas[name]) for name in tools.required)


def _arguments(schema: Mapping[str, Any]) -> Format:
    """A schema that says nothing is an object all the same."""
    return {"type": "json_schema", "json_schema": {"type": "object", **schema}, "max_whitespace_cnt": _SPACES}


def _thought(prompt: str) -> Iterator[Format]:
    state = prompt_state(prompt)
    if state == "closed":
        return
    begin = "" if state == "open" else OPEN
    thought = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": CLOSE}
    yield thought if state == "open" else {"type": "optional", "content": thought}
    yield {"type": "regex", "pattern": r"[ \n]{0,4}"}


def _text(value: str) -> Format:
    return {"type": "const_string", "value": value}
