"""JSON as it goes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from pydantic import BaseModel
from starlette.responses import Response

JSON: Final = "application/json"
to_json: Final = msgspec.json.Encoder().encode  # NaN as null


def answer(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A pydantic model, or what msgspec writes: dicts, lists, structs."""
    body = data.model_dump_json().encode() if isinstance(data, BaseModel) else to_json(data)
    return Response(body, status, headers, JSON)
