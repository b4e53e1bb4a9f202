"""What the server writes to stderr, its own and uvicorn's: a line each, as text or as JSON.

A line never holds a prompt, a text, a key, or the message of an exception, which may quote one: its type and the places
in the source that it came through stand for it.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

LOGGER: Final = logging.getLogger("penstock.serve")
_PLAIN: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:/{}")
_MOST_FRAMES: Final = 8


def config(format: str, level: str) -> dict[str, Any]:
    """For `logging.config.dictConfig`. `format`: text or json. uvicorn's own access log is not needed."""
    made = {"handlers": ["stderr"], "level": level.upper(), "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": f"{__name__}.{'JsonLines' if format == 'json' else 'TextLines'}"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}},
        "loggers": {
            "penstock": made,
            "uvicorn": made,
            "opentelemetry": made,
            "uvicorn.access": {"handlers": [], "level": "WARNING", "propagate": False},
        },
    }


def say(
    message: str, fields: Mapping[str, object], level: int = logging.INFO, error: BaseException | None = None
) -> None:
    """A line with fields, in their order; those that are None are left out."""
    if LOGGER.isEnabledFor(level):
        known = {name: value for name, value in fields.items() if value is not None}
        LOGGER.log(level, "%s", message, exc_info=error, extra={"fields": known})


class JsonLines(logging.Formatter):
    """An object a line: time, level, logger, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        head = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        return json.dumps({**head, "message": record.getMessage(), **_fields(record)}, default=str)


class TextLines(logging.Formatter):
    """The same for people: `name=value`, in quotes where it is no plain word."""

    def format(self, record: logging.LogRecord) -> str:
        message = json.dumps(record.getMessage(), ensure_ascii=False)[1:-1].replace('\\"', '"')  # one line in any case
        told = " ".join(f"{name}={_word(value)}" for name, value in _fields(record).items())
        return f"{_time(record)} {record.levelname} {message} {told}".rstrip()


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, object]:
    given: Mapping[str, object] = getattr(record, "fields", {})
    error = record.exc_info[1] if record.exc_info else None
    return {**given, **({} if error is None else _of_error(error))}


def _of_error(error: BaseException) -> dict[str, object]:
    frames = traceback.extract_tb(error.__traceback__)[-_MOST_FRAMES:]
    stack = " < ".join(f"{f.name} ({'/'.join(f.filename.split('/')[-2:])}:{f.lineno})" for f in reversed(frames))
    kinds = [type(each).__name__ for each in _chain(error)]
    return {"error": " from ".join(kinds), "stack": stack}


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__
    return found


def _word(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if text and _PLAIN.issuperset(text) else json.dumps(text)
