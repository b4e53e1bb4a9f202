"""What a caller is told when something is wrong: OpenAI's JSON, the status from one table, nothing of the machine."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, Final, NamedTuple

from pydantic import ValidationError
from starlette.responses import Response

from penstock.errors import (
    InputError,
    LengthError,
    PenstockError,
    QueueFullError,
    TokenizerError,
    UnsupportedError,
)
from penstock.serve.answers import answer
from penstock.serve.link import EngineDied, EngineUnready

MOST_CHARACTERS: Final = 2000  # of a message
MOST_SHOWN: Final = 100  # of a value in one
MOST_ERRORS: Final = 3  # of a body, told
_COUNTED: Final = 1000  # errors of a body, above which none is looked at: making them takes time
_PARAM: Final = re.compile(r"([a-z_]{1,40})=")  # how the package's messages begin where a parameter is wrong

_FIELD: Final = re.compile(r"[a-z_]+")
CODES: Final = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}  # by pydantic's type

INVALID, SERVER = "invalid_request_error", "server_error"
INTERNAL: Final = "internal_error"


class RequestError(PenstockError):
    """A request that the server itself refuses."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})


class Refusal(NamedTuple):
    """An error as it goes out."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = {}

    @property
    def unexpected(self) -> bool:
        """Whether the log has to say more than the answer."""
        return self.code == INTERNAL

    @property
    def body(self) -> dict[str, Any]:
        """Of the answer, or of an event of a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return answer(self.body, self.status, self.headers)


class _Row(NamedTuple):
    kind: type[Exception]
    status: int
    type: str
    code: str | None
    says: str | None = None  # instead of the error's own message
    headers: Mapping[str, str] = {}


# The first row that fits. RequestError has a status of its own, and is not here.
TABLE: Final = (
    _Row(LengthError, 400, INVALID, "context_length_exceeded"),
    _Row(QueueFullError, 429, "rate_limit_error", "queue_full", headers={"retry-after": "1"}),
    _Row(InputError, 400, INVALID, "invalid_value"),
    _Row(UnsupportedError, 400, INVALID, "unsupported"),
    _Row(EngineUnready, 503, SERVER, "engine_unready"),
    _Row(
        EngineDied,
        500,
        SERVER,
        "engine_died",
        "the engine process ended while it ran this request, and is being restarted; send the request again",
    ),
    _Row(
        TokenizerError,
        400,
        INVALID,
        "invalid_template",
        "the model's tokenizer or chat template cannot take this; the server's log says why",
    ),
    _Row(Exception, 500, SERVER, INTERNAL, "the server failed at this request; its log says why"),
)


def too_late(what: str, own: bool) -> RequestError:
    """Of a request whose deadline came before any of its answer; `own`: one that it stated itself, not the server's."""
    said = f"no {what} came within the request's timeout or queue_timeout; try again later, or allow more"
    again = {"retry-after": "1"}
    return (
        RequestError(408, said, "timeout", headers=again) if own else RequestError(503, said, "timeout", headers=again)
    )


def refusal(error: Exception) -> Refusal:
    """What the caller is told of an error. A message of ours goes out, bounded; of anything else nothing does."""
    if isinstance(error, RequestError):
        kind = INVALID if error.status < 500 else SERVER
        return Refusal(error.status, bounded(str(error)), kind, error.param, error.code, error.headers)
    row = next(row for row in TABLE if isinstance(error, row.kind))
    message = row.says or bounded(str(error))
    headers = (
        {"retry-after": str(max(1, round(error.retry_after)))} if isinstance(error, EngineUnready) else row.headers
    )
    param = _PARAM.match(message) if row.status == 400 else None
    return Refusal(row.status, message, row.type, param and param[1], row.code, headers)


def bounded(text: str, most: int = MOST_CHARACTERS) -> str:
    """One line, valid Unicode, the middle left out where it is long."""
    text = " ".join(text.split()) if len(text) <= 4 * most else text
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 4 :]}"
    return text.encode("utf-8", "replace").decode("utf-8")


def invalid(error: ValidationError, fields: Collection[str]) -> RequestError:
    """pydantic's errors in one sentence that names the fields. `fields`: what the body may well hold."""
    count = error.error_count()
    if count > _COUNTED:
        said = f"the body has {count} errors against what this path takes; see /openapi.json"
        return RequestError(400, said, "invalid_value")
    found = error.errors(include_url=False, include_context=False)
    told = [_sentence(each["loc"], each["type"], each["msg"], each["input"], fields) for each in found[:MOST_ERRORS]]
    more = f"; and {count - MOST_ERRORS} more" if count > MOST_ERRORS else ""
    where, begins = found[0]["loc"], _FIELD.match(told[0])  # an error between fields begins with one
    param = bounded(str(where[0]), MOST_SHOWN) if where else begins[0] if begins and begins[0] in fields else None
    return RequestError(400, "; ".join(told) + more, CODES.get(found[0]["type"], "invalid_value"), param)


def _sentence(where: tuple[int | str, ...], kind: str, message: str, value: object, fields: Collection[str]) -> str:
    place = bounded(".".join(map(str, where)), MOST_SHOWN)
    if kind == "extra_forbidden":
        near = get_close_matches(place, fields, 1, 0.75) if len(where) == 1 else []
        return f"unknown field {place!r}" + "".join(f", did you mean {name!r}?" for name in near)
    if kind == "missing":
        return f"{place}: is required"
    said = message.removeprefix("Value error, ")
    return f"{place + ': ' if place else ''}{said[:1].lower() + said[1:]}{_shown(value)}"


def _shown(value: object) -> str:
    """Scalars alone: of anything else the field's name says enough."""
    if value is None or isinstance(value, bool | int | float | str):
        return f" (got {bounded(repr(value[:MOST_SHOWN] if isinstance(value, str) else value), MOST_SHOWN)})"
    return ""
