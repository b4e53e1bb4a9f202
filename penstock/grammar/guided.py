"""What a text may be held to, and the limits of asking."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from penstock.errors import SamplingError

MOST_CHARACTERS: Final = 1 << 18  # of a schema, an expression, a grammar, or all choices
MOST_CHOICES: Final = 10_000
SHOWN: Final = 60  # characters of what was given, in errors
Kind = Literal["json", "json_object", "regex", "choice", "grammar", "structural_tag"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@dataclass(frozen=True)
class GuidedDecoding:
    """What a text is held to; names as vLLM's, exactly one is given. Bad values raise SamplingError.

    json: a JSON schema, a mapping or its text (kept as text). json_object: any JSON object. regex: an expression that
    the whole text matches. choice: the texts that it may be. grammar: GBNF, whose rule `root` derives the whole text.
    structural_tag: xgrammar's description of free text with tags in it, as the server makes one of tools.
    Which keywords of a schema are taken: `penstock.grammar.schema`.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise SamplingError(f"guided_decoding: json_object={_shown(self.json_object)} is not True or False")
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            told = " and ".join(given) or "nothing"
            raise SamplingError(f"guided_decoding asks for {told}; give exactly one of {', '.join(KINDS)}")
        if isinstance(self.json, Mapping):
            object.__setattr__(self, "json", _written(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("json", "regex", "grammar", "structural_tag"):
            _check_text(name, getattr(self, name))

    @property
    def kind(self) -> Kind:
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    @property
    def text(self) -> str:
        """All that it says beside its kind."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json.dumps(value)


def _written(schema: Mapping[str, Any]) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SamplingError(f"guided_decoding: json={_shown(schema)} cannot be written as JSON: {error}") from None


def _choices(given: object) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, list | tuple) or not 0 < len(given) <= MOST_CHOICES:
        raise SamplingError(f"guided_decoding: choice={_shown(given)} is no list of 1 to {MOST_CHOICES} texts")
    for each in given:
        _check_text("choice", each)
    if sum(map(len, given)) > MOST_CHARACTERS:
        raise SamplingError(f"guided_decoding: choice holds over {MOST_CHARACTERS} characters; give fewer")
    return tuple(given)


def _check_text(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not value:
        raise SamplingError(f"guided_decoding: {name} holds {_shown(value)}; give a text of 1 character or more")
    if len(value) > MOST_CHARACTERS:
        raise SamplingError(f"guided_decoding: {name} has {len(value)} characters, at most {MOST_CHARACTERS}")
    if any("\ud800" <= character <= "\udfff" for character in value) or "\0" in value:
        raise SamplingError(f"guided_decoding: {name}={_shown(value)} holds half a character, or U+0000")


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = "..."
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
