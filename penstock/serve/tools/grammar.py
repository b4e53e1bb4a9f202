"""Where a call is required: the texts that are such calls in the model's own style, as a structural tag of xgrammar.

Markers that are special tokens are spelt out there: no grammar may use a special token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
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
Format = dict[str, Any]


def structural_tag(style: StyleName, tools: Tools, *, compact: bool = False, prompt: str | None = None) -> str:
    """One call or several of the required tools, each with arguments of its schema. compact: Mistral's
    `name[ARGS]{...}`. prompt: of a model that may think first, as rendered."""
    calls = [*_thought(prompt)] if prompt is not None else []
    if compact and style == "mistral":
        calls.append(_compact(tools))
    else:
        calls += [_text(_BEFORE[style]), _listed(style, tools), _text(_BEHIND[style])]
    elements = [each for each in calls if each.get("value") != ""]
    return json.dumps({"type": "structural_tag", "format": {"type": "sequence", "elements": elements}})


def _listed(style: StyleName, tools: Tools) -> Format:
    begin, end = _AROUND[style]
    tags = [
        {"type": "tag", "begin": begin % json.dumps(name), "content": _arguments(schema), "end": end}
        for name, schema in _required(tools)
    ]
    return {
        "type": "tags_with_separator", "tags": tags, "separator": _BETWEEN[style],
        "at_least_one": True, "stop_after_first": not tools.parallel,
    }  # fmt: skip


def _compact(tools: Tools) -> Format:
    calls = [
        {"type": "sequence", "elements": [_text(f"[TOOL_CALLS]{name}[ARGS]"), _arguments(schema)]}
        for name, schema in _required(tools)
    ]
    call = {"type": "or", "elements": calls}
    return {"type": "plus", "content": call} if tools.parallel else call


def _required(tools: Tools) -> Iterator[tuple[str, Mapping[str, Any]]]:
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
