"""The settings beside the shards: NeMo's model_config.yaml, or Megatron's arguments as JSON. Data, never code.

YAML is read as far as such files go: mappings and lists by indentation or in brackets, and scalars. Anchors, tags,
merged keys and texts over several lines are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError, TokenizerError
from penstock.text.files import MAX_DEPTH, parse_json, read_text

FILES = {
    "nemo": ("model_config.yaml", "model_config.json", "model_config.yml"),
    "megatron": ("args.json", "megatron_args.json", "args.yaml"),
}
_KEY = re.compile(r"""([A-Za-z_][\w.\-/ ]*|'[^']*'|"[^"\\]*"):(?:\s+(.*))?$""")
_INTEGER, _FLOAT = re.compile(r"[-+]?\d+"), re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "true": True, "false": False, "True": True, "False": False}
MAX_LINES = 10_000  # such files have some hundred
_Line = tuple[int, str, int]  # indentation, content, number


def read_settings(directories: Sequence[Path], model_format: str) -> dict[str, Any]:
    """The settings in the first of the directories that has them. Raises ConfigError."""
    names = FILES[model_format]
    found = [folder / name for folder in directories for name in names if (folder / name).is_file()]
    if not found:
        raise ConfigError(
            f"{directories[0]} has no {names[0]}, which says what the {model_format} model is; for Megatron's .pt save "
            "json.dump(vars(state['args'])), NeMo's .nemo holds model_config.yaml"
        )
    try:
        text = read_text(found[0])
        value = parse_json(text) if found[0].suffix == ".json" else parse_yaml(text)
    except (ValueError, TokenizerError) as error:
        raise ConfigError(f"{found[0]} cannot be read: {error}; write it as plain data") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{found[0]} holds no settings by name; write a mapping")
    return value


def parse_yaml(text: str) -> Any:
    """Raises ValueError naming the line that is beyond this subset."""
    if text.count("\n") > MAX_LINES:
        raise ValueError(f"{text.count(chr(10))} lines, at most {MAX_LINES}")
    lines = [line for number, raw in enumerate(text.splitlines(), 1) if (line := _line(raw, number)) is not None]
    if not lines:
        return {}
    value, rest = _block(lines, lines[0][0], 0)
    if rest:
        raise ValueError(f"line {rest[0][2]}: {rest[0][1][:60]!r} is indented like nothing before it")
    return value


def _line(raw: str, number: int) -> _Line | None:
    content = _uncommented(raw).strip()
    if "\t" in raw[: len(raw) - len(raw.lstrip())]:
        raise ValueError(f"line {number}: indented by a tab")
    return None if content in ("", "---") else (len(raw) - len(raw.lstrip()), content, number)


def _uncommented(raw: str) -> str:
    quote = ""
    for index, character in enumerate(raw):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (index == 0 or raw[index - 1] in " [,"):
            quote = character
        elif character == "#" and (index == 0 or raw[index - 1] == " "):
            return raw[:index]
    return raw


def _block(lines: list[_Line], indent: int, depth: int) -> tuple[Any, list[_Line]]:
    """The mapping or list whose lines stand at `indent`, and the lines after it."""
    if depth > MAX_DEPTH:
        raise ValueError(f"line {lines[0][2]}: nested deeper than {MAX_DEPTH}")
    return (_list if _is_item(lines[0][1]) else _mapping)(lines, indent, depth)


def _is_item(content: str) -> bool:
    return content == "-" or content.startswith("- ")


def _mapping(lines: list[_Line], indent: int, depth: int) -> tuple[Any, list[_Line]]:
    out: dict[str, Any] = {}
    while lines and lines[0][0] == indent and not _is_item(lines[0][1]):
        content, number = lines[0][1:]
        match = _KEY.match(content)
        if match is None:
            raise ValueError(f"line {number}: {content[:60]!r} is no `key: value`")
        key, written = match[1].strip("'\""), match[2]
        if key in out:
            raise ValueError(f"line {number}: {key!r} is there twice")
        lines = lines[1:]
        # A list may stand as far left as its key.
        deeper = lines and (lines[0][0] > indent or (lines[0][0] == indent and _is_item(lines[0][1])))
        if written is None and deeper:
            out[key], lines = _block(lines, lines[0][0], depth + 1)
        else:
            out[key] = _value(written or "", number)
    return out, lines


def _list(lines: list[_Line], indent: int, depth: int) -> tuple[Any, list[_Line]]:
    out: list[Any] = []
    while lines and lines[0][0] == indent and _is_item(lines[0][1]):
        content, number = lines[0][1:]
        inner = content[1:].strip()
        if _KEY.match(inner) or _is_item(inner):  # a mapping or list that begins behind the dash
            begin = indent + len(content) - len(inner)
            item, lines = _block([(begin, inner, number), *lines[1:]], begin, depth + 1)
        else:
            item, lines = _value(inner, number), lines[1:]
        out.append(item)
    return out, lines


def _value(text: str, number: int) -> Any:
    if text[:1] in ("[", "{"):
        return _bracketed(text, number)
    if text[:1] in tuple("&*!|>%@`?"):
        raise ValueError(f"line {number}: {text[:60]!r} is YAML beyond plain data")
    return _scalar(text, number)


def _bracketed(text: str, number: int) -> Any:
    """[a, b], [] or {}; a list in a list, or a mapping with content, is not written so in these files."""
    close = {"[": "]", "{": "}"}[text[0]]
    inner = text[1:-1].strip()
    if text[-1:] != close or any(c in inner for c in "[]{}") or (close == "}" and inner):
        raise ValueError(f"line {number}: {text[:60]!r} is beyond a list of scalars")
    if close == "}":
        return {}
    return [_scalar(part.strip(), number) for part in inner.split(",")] if inner else []


def _scalar(text: str, number: int) -> Any:
    if text[:1] in ("'", '"'):
        if len(text) < 2 or text[-1] != text[0] or "\\" in text or text[0] in text[1:-1]:
            raise ValueError(f"line {number}: {text[:60]!r} is no simple quoted text")
        return text[1:-1]
    if text in _WORDS:
        return _WORDS[text]
    if text.lower() in ("yes", "no", "on", "off", "y", "n"):
        raise ValueError(f"line {number}: {text!r} means different things to different readers; write true or false")
    if _INTEGER.fullmatch(text) and len(text) < 20:
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
