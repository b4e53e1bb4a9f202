"""Responses as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from pydantic import BaseModel
from starlette.responses import Response

_ENCODE = msgspec.json.Encoder().encode
JSON = "application/json"


def answer(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A pydantic model, or what msgspec writes: dicts, lists, structs; NaN as null."""
    body = data.model_dump_json().encode() if isinstance(data, BaseModel) else _ENCODE(data)
    return Response(body, status, headers, JSON)
