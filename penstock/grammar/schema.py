"""JSON schemas as far as they can be enforced: a closed world of keywords, so that none is ignored in silence.

xgrammar enforces the keywords listed here, where they stand with others as listed; it would pass over any other, and
what it gets wrong is written otherwise or refused. Texts are narrower than the schema: members come in its order, those
it does not list only where additionalProperties says so, strings of limited length have no escapes, and `oneOf` needs
branches that are plainly disjoint. A format is held to in its syntax.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from penstock.errors import SamplingError

MOST_DEPTH: Final = 64
MOST_VALUES: Final = 20_000  # objects, lists, names and the like, in all
_SAID: Final = frozenset({
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id",
    "$defs", "definitions",
})  # fmt: skip
_BY_TYPE: Final[dict[str, frozenset[str]]] = {
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "object": frozenset({"properties", "required", "additionalProperties", "minProperties", "maxProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
_FORMATS: Final = frozenset({
    "email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference",
    "uri-template",
})  # fmt: skip
_BYTE: Final = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_CHARACTER: Final = r'[^"\\\x00-\x1f]'  # that a string of JSON holds as it is
_ESCAPED: Final = frozenset('"\\0bcfnrtuvx')  # behind a backslash: what such a string may not hold, or the name of any
_ALONE: Final = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")  # each says all there is to say


def checked(text: str) -> str:
    """The same schema, in words that the library keeps to. Raises SamplingError that names what cannot be enforced."""
    try:
        schema = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise SamplingError(f"the schema is no JSON: {str(error)[:200]}") from None
    if not isinstance(schema, dict):
        raise SamplingError(f"the schema is {text[:60]!r}; give an object")
    check_size(schema)
    _check(schema, "schema", schema)
    return json.dumps(schema)


def checked_tag(text: str) -> str:
    """A structural tag with the schemas in it. Raises SamplingError as `checked`."""
    try:
        tag = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SamplingError(f"the structural tag is no JSON: {str(error)[:200]}") from None
    check_size(tag)
    for each in _within(tag):
        if isinstance(each, dict) and isinstance(own := each.get("json_schema"), dict):
            _check(own, "schema", own)
    return json.dumps(tag)


def _within(value: Any) -> Iterator[Any]:
    """All values, but for those of schemas."""
    yield value
    named = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in named:
        if name != "json_schema":
            yield from _within(each)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice in one object")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def check_size(schema: Any) -> None:
    """Level by level, so that no depth of it matters here. Raises SamplingError."""
    level, count = [schema], 0
    for _ in range(MOST_DEPTH):
        level = [part for each in level for part in _parts(each)]
        count += len(level)
        if count > MOST_VALUES:
            raise SamplingError(f"the schema has over {MOST_VALUES} values; make it smaller")
        if not level:
            return
    raise SamplingError(f"the schema is over {MOST_DEPTH} levels deep; make it flatter")


def _parts(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _check(schema: Any, where: str, root: Mapping[str, Any]) -> None:
    """Refuse what cannot be enforced, and mend in place what the library gets wrong."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise SamplingError(f"{where} is {str(schema)[:60]!r}; give a schema")
    for group in ("$defs", "definitions"):
        for name, each in _mapping(schema.get(group, {}), f"{where}/{group}").items():
            _check(each, f"{where}/{group}/{name}", root)
    asked = {key for key in schema if key not in _SAID}
    alone = [key for key in _ALONE if key in asked]
    if alone:
        _check_alone(schema, alone[0], asked, where, root)
        return
    kinds = _kinds(schema, where)
    known = frozenset({"type"}).union(*(_BY_TYPE[kind] for kind in kinds))
    if unknown := sorted(asked - known):
        raise _unenforced(where, unknown[0])
    schema["type"] = kinds if len(kinds) > 1 else kinds[0]
    _check_string(schema, where)
    _check_members(schema, where)
    for place, each in _below(schema, where):
        _check(each, place, root)


def _check_alone(schema: Mapping[str, Any], key: str, asked: set[str], where: str, root: Mapping[str, Any]) -> None:
    others = asked - {key}
    if key in ("const", "enum") and "type" in others:
        values = [schema["const"]] if key == "const" else _list(schema["enum"], f"{where}/enum")
        kinds = _kinds(schema, where)
        if wrong := [each for each in values if not any(_is(kind, each) for kind in kinds)]:
            raise SamplingError(f"{where}: {key} holds {str(wrong[0])[:60]!r}, which is not of the type beside it")
        others -= {"type"}
    if others:
        raise SamplingError(f"{where}: {sorted(others)[0]!r} beside {key!r} cannot be enforced; leave one of them out")
    value = schema[key]
    if key == "$ref":
        _check_reference(value, where, root)
    elif key not in ("const", "enum"):
        branches = _list(value, f"{where}/{key}")
        if key == "allOf" and len(branches) != 1:
            raise SamplingError(f"{where}: allOf of {len(branches)} schemas cannot be enforced; join them into one")
        for index, each in enumerate(branches):
            _check(each, f"{where}/{key}/{index}", root)


def _check_reference(value: object, where: str, root: Mapping[str, Any]) -> None:
    found: Any = root
    if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
        raise SamplingError(f"{where}: $ref={str(value)[:60]!r} is none of this schema's own; give '#/...'")
    for name in value.split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or name not in found:
            raise SamplingError(f"{where}: $ref={value[:60]!r} names nothing in the schema")
        found = found[name]


def _kinds(schema: Mapping[str, Any], where: str) -> list[str]:
    """The types it names; else the one whose keywords it has; else all."""
    given = schema.get("type")
    if given is None:
        own = [kind for kind, keys in _BY_TYPE.items() if keys & schema.keys() and kind != "integer"]
        if len(own) > 1:
            raise SamplingError(f"{where} has keywords of {' and '.join(own)}, and no type; give the type")
        return own or [kind for kind in _BY_TYPE if kind != "integer"]
    kinds = given if isinstance(given, list) else [given]
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _BY_TYPE:
            raise SamplingError(f"{where}: type {str(kind)[:60]!r} is unknown; known are {', '.join(_BY_TYPE)}")
    return kinds


def _check_string(schema: dict[str, Any], where: str) -> None:
    told: list[str] = [key for key in ("format", "pattern") if key in schema]
    told += ["minLength or maxLength"] if {"minLength", "maxLength"} & schema.keys() else []
    if len(told) > 1:
        raise SamplingError(f"{where}: {told[1]} beside {told[0]} cannot be enforced; leave one of them out")
    if "format" in schema and schema["format"] not in _FORMATS:
        shown = str(schema["format"])[:60]
        raise SamplingError(f"{where}: format {shown!r} cannot be enforced; known are {', '.join(sorted(_FORMATS))}")
    if "pattern" in schema:
        _check_pattern(schema["pattern"], where)
    elif schema.get("format") == "ipv4":  # the library's own takes leading zeros
        del schema["format"]
        schema["pattern"] = rf"^{_BYTE}(\.{_BYTE}){{3}}$"
    elif "minLength or maxLength" in told:  # the library's own takes line ends as they are
        low, high = _count(schema.pop("minLength", 0), where), schema.pop("maxLength", None)
        most = "" if high is None else _count(high, where)
        schema["pattern"] = f"^{_CHARACTER}{{{low},{most}}}$"


def _check_pattern(pattern: object, where: str) -> None:
    """Classes are cut down to what a string may hold as it is; single characters are not."""
    if not isinstance(pattern, str):
        raise SamplingError(f"{where}: pattern {str(pattern)[:60]!r} is no text; give an expression")
    plain = re.sub(r"\[\^?\]?(\\.|[^\]\\])*\]", "", pattern, flags=re.DOTALL)
    escapes = re.findall(r"\\(.?)", plain, re.DOTALL)
    if any(each in _ESCAPED for each in escapes) or re.search(r'["\x00-\x1f]', plain):
        raise SamplingError(
            f"{where}: pattern {pattern[:60]!r} names a character that JSON escapes, or one by its number, "
            f"which cannot be enforced; leave it out, or write it as it is"
        )


def _count(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SamplingError(f"{where}: {str(value)[:60]!r} is no number of characters; give an integer from 0")
    return value


def _check_members(schema: Mapping[str, Any], where: str) -> None:
    known = _mapping(schema.get("properties", {}), f"{where}/properties")
    for name in _list(schema["required"], f"{where}/required") if schema.get("required") else ():
        if not isinstance(name, str) or name not in known:
            raise SamplingError(f"{where}: required holds {str(name)[:60]!r}, which properties does not list; list it")
    if schema.get("minProperties", 0) and schema.get("additionalProperties", False) is not False:
        raise SamplingError(f"{where}: minProperties beside additionalProperties cannot be enforced; leave one out")


def _below(schema: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for name, each in _mapping(schema.get("properties", {}), f"{where}/properties").items():
        yield f"{where}/properties/{name}", each
    for key in ("additionalProperties", "items"):
        if key in schema:
            yield f"{where}/{key}", schema[key]
    for index, each in enumerate(_list(schema["prefixItems"], where) if "prefixItems" in schema else ()):
        yield f"{where}/prefixItems/{index}", each


def _unenforced(where: str, key: str) -> SamplingError:
    return SamplingError(f"{where}: {key[:60]!r} cannot be enforced here; leave it out, or check the text yourself")


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise SamplingError(f"{where} is no object; correct it")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise SamplingError(f"{where} is no list of 1 or more; correct it")
    return value


def _is(kind: str, value: object) -> bool:
    types: Any = {"string": str, "boolean": bool, "null": type(None), "object": dict, "array": list}
    if kind in types:
        return isinstance(value, types[kind])
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return kind == "number" or isinstance(value, int) or value.is_integer()
