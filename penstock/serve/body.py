"""A request's body as a model of pydantic, or an error that says what is wrong with it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from starlette.requests import Request

from penstock.serve.errors import RequestError, bounded, invalid

MOST_OBJECTS: Final = 50_000  # in one body
MOST_KEYS: Final = 10_000  # of one object
_ASIDE: Final = 1 << 18  # bytes, above which another thread checks a body

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Refused(BeforeValidator):
    """Marks a field that is known, so that what to do instead can be said."""


class Body(BaseModel):
    """What requests are made of: a field that is not known is an error, a number is a number, and is finite."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        frozen=True,
        protected_namespaces=(),
        regex_engine="rust-regex",
    )


async def read_json(request: Request, model: type[M]) -> M:
    """The body, whatever its content type says. Raises RequestError, a 400."""
    body = await request.body()
    if len(body) > _ASIDE:
        return await asyncio.to_thread(parse, body, model)
    return parse(body, model)


def parse(body: bytes, model: type[M]) -> M:
    """As `read_json`."""
    check_json(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error, _taken(model)) from None


def _taken(model: type[BaseModel]) -> list[str]:
    """Fields that are not refused whatever they hold."""
    every = model.model_fields.items()
    return [name for name, field in every if not any(isinstance(each, Refused) for each in field.metadata)]


def check_json(body: bytes) -> None:
    """What pydantic's parser lets through, or takes long over: keys given twice, NaN, deep nesting, objects without
    number. Raises RequestError."""
    if not body.strip():
        raise RequestError(400, "the body is empty; send a JSON object", "invalid_json")
    objects = 0

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal objects
        objects += 1
        if objects > MOST_OBJECTS:
            _refuse(f"it holds more than {MOST_OBJECTS} objects")
        found = dict(pairs)
        if len(found) > MOST_KEYS:
            _refuse(f"an object has {len(found)} keys, at most {MOST_KEYS}")
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            _refuse(f"the key {bounded(twice, 100)!r} is given twice")
        return found

    try:
        json.loads(body.decode("utf-8"), object_pairs_hook=once, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        _refuse(f"it is no UTF-8 at byte {error.start}")
    except RecursionError:
        _refuse("it is nested too deep")
    except json.JSONDecodeError as error:
        _refuse(f"{error.msg} at line {error.lineno}, column {error.colno}")
    except ValueError:  # Python's own limit
        _refuse("a number has too many digits")


def _no_number(word: str) -> NoReturn:
    _refuse(f"{word} is no number of JSON")


def _refuse(why: str) -> NoReturn:
    raise RequestError(400, f"the body cannot be read as JSON: {why}", "invalid_json")
