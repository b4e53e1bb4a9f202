"""Every text that a schema's grammar allows is JSON that fulfils it, and what cannot be enforced is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from penstock.errors import SamplingError
from penstock.grammar import GuidedDecoding, schema
from penstock.text import Tokenizer
from tests.cpu.grammar.conftest import Walker

INTEGER, FLAG = {"type": "integer"}, {"type": "boolean"}
ENFORCED: list[dict[str, Any]] = [
    {},
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": -5, "maximum": 1234}}, "required": ["a"]},
    {"type": "object", "properties": {"a": INTEGER, "b": FLAG, "c": {"type": "null"}}, "required": ["b"]},
    {"type": "object", "additionalProperties": INTEGER, "maxProperties": 3},
    {"type": "object", "properties": {"a": INTEGER, "b": INTEGER, "c": INTEGER}, "minProperties": 2},
    {"type": "object", "properties": {'é"q': FLAG}, "required": ['é"q'], "additionalProperties": False},
    {"properties": {"a": FLAG}, "required": ["a"], "title": "said", "description": "only"},
    {"type": "array", "items": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 100}, "minItems": 2},
    {"type": "array", "prefixItems": [INTEGER, FLAG], "items": {"type": "null"}, "maxItems": 4},
    {"type": "array", "prefixItems": [INTEGER, FLAG], "items": False},
    {"maxItems": 1, "items": FLAG},
    {"type": "number", "minimum": 0.5, "maximum": 2.25},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"minimum": 2, "maximum": 9},
    {"type": "integer", "maximum": -10},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "minLength": 2},
    {"minLength": 2, "maxLength": 3},
    {"type": "string", "pattern": "^[a-c]{2,4}x?$"},
    {"type": "string", "pattern": "[^a]b|[\\]\"]?c"},
    {"enum": ["x", 1, None, [1, 2], {"a": 1}]},
    {"const": {"k": [1, "é"]}},
    {"type": "string", "enum": ["p", "q"]},
    {"anyOf": [INTEGER, FLAG]},
    {"oneOf": [FLAG, {"type": "null"}]},
    {"allOf": [FLAG]},
    {"type": ["integer", "null"], "minimum": 3},
    {"type": ["string", "boolean"], "maxLength": 2},
    {
        "$ref": "#/$defs/t",
        "$defs": {"t": {"type": "object", "properties": {"v": INTEGER, "n": {"$ref": "#/$defs/t"}}, "required": ["v"]}},
    },
    *({"type": "string", "format": name} for name in ("ipv4", "ipv6", "uuid", "time", "duration", "hostname")),
]  # fmt: skip
REFUSED: list[tuple[Any, str]] = [
    ({"not": FLAG}, "'not' cannot be enforced"),
    ({"type": "string", "frobnicate": 3}, "'frobnicate'"),
    ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
    ({"type": "array", "contains": INTEGER}, "'contains'"),
    ({"if": FLAG, "then": INTEGER}, "'if'"),
    ({"properties": {"a": {"items": {"dependentRequired": {}}}}}, "schema/properties/a/items: 'dependentRequired'"),
    ({"type": "string", "format": "json-pointer"}, "json-pointer"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "minLength or maxLength beside pattern"),
    ({"type": "string", "pattern": 'a"b'}, "JSON escapes"),
    ({"type": "string", "pattern": "\\x22"}, "JSON escapes"),
    ({"type": "integer", "maxLength": 3}, "'maxLength'"),
    ({"type": "frob"}, "'frob' is unknown"),
    ({"minLength": 1, "minimum": 1}, "give the type"),
    ({"type": "object", "required": ["z"]}, "'z', which properties does not list"),
    ({"minProperties": 2, "additionalProperties": FLAG}, "minProperties beside additionalProperties"),
    ({"allOf": [FLAG, INTEGER]}, "allOf of 2"),
    ({"anyOf": [FLAG], "type": "integer"}, "'type' beside 'anyOf'"),
    ({"enum": [1, "a"], "type": "integer"}, "'a', which is not of the type"),
    ({"$ref": "http://x/y"}, "none of this schema's own"),
    ({"$ref": "#/$defs/none"}, "names nothing"),
    ({"type": "string", "maxLength": -1}, "no number of characters"),
    ({"properties": [1]}, "schema/properties is no object"),
    ({"anyOf": []}, "no list of 1 or more"),
    ({"properties": {"a": 3}}, "schema/properties/a is '3'"),
]


@pytest.mark.parametrize("asked", ENFORCED, ids=lambda asked: json.dumps(asked)[:60])
def test_what_is_allowed_fulfils_the_schema(walker: Walker, tokenizer: Tokenizer, asked: dict[str, Any]) -> None:
    validator, ended = Draft202012Validator(asked, format_checker=Draft202012Validator.FORMAT_CHECKER), 0
    for seed in range(12):
        tokens = walker.walk(GuidedDecoding(json=asked or "{ }"), seed)
        if tokens is not None:
            validator.validate(json.loads(tokenizer.decode(tokens)))
            ended += 1
    assert ended > 3


@pytest.mark.parametrize(("asked", "why"), REFUSED, ids=lambda asked: json.dumps(asked)[:40])
def test_what_cannot_be_enforced_is_named(asked: Any, why: str) -> None:
    with pytest.raises(SamplingError) as caught:
        schema.checked(json.dumps(asked))
    assert why in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[1]", "give an object"),
        ("{", "no JSON"),
        ('{"minimum": NaN}', "no number of JSON"),
        ('{"type": "null", "type": "string"}', "twice"),
        ('{"items":' * 60 + "{}" + "}" * 60, ""),
        ('{"items":' * 100 + "{}" + "}" * 100, "levels deep"),
        ('{"items":' * 20_000 + "{}" + "}" * 20_000, "no JSON|levels deep"),
        (json.dumps({"enum": list(range(30_000))}), "over 20000 values"),
    ],
)  # fmt: skip
def test_texts_that_are_no_schema(text: str, why: str) -> None:
    if len(text) < 700 and not why:
        schema.checked(text)
        return
    with pytest.raises(SamplingError, match=why):
        schema.checked(text)


def test_a_structural_tag_has_its_schemas_checked(walker: Walker, tokenizer: Tokenizer) -> None:
    def tag(schema: dict[str, Any]) -> GuidedDecoding:
        call = {
            "type": "tag",
            "begin": "<call>",
            "content": {"type": "json_schema", "json_schema": schema},
            "end": "</>",
        }
        return GuidedDecoding(structural_tag=json.dumps({"type": "structural_tag", "format": call}))

    ended = [
        tokens for seed in range(8) if (tokens := walker.walk(tag({"minimum": 2, "maximum": 9}), seed)) is not None
    ]
    for tokens in ended:
        text = tokenizer.decode(tokens)
        assert text[:6] == "<call>" and text[-3:] == "</>" and 2 <= json.loads(text[6:-3]) <= 9
    assert ended
    for wrong in (tag({"not": FLAG}), GuidedDecoding(structural_tag="["), GuidedDecoding(structural_tag='{"type": 3}')):
        with pytest.raises(SamplingError, match="guided_decoding: structural_tag cannot be used"):
            walker.compiler.compile(wrong)


def test_oneof_that_overlaps_is_refused(walker: Walker) -> None:
    with pytest.raises(SamplingError, match="oneOf with overlapping"):
        walker.compiler.compile(GuidedDecoding(json={"oneOf": [INTEGER, {"type": "number"}]}))
