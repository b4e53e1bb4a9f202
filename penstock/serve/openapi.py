"""The OpenAPI document of a table of endpoints, from their models of pydantic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from penstock.serve.answers import JSON, answer
from penstock.serve.guard import OPEN, WATCHED
from penstock.serve.serving import Endpoint, Serving
from penstock.version import __version__

Schemas = Mapping[tuple[Any, Literal["validation", "serialization"]], Mapping[str, Any]]
EVENTS: Final = "text/event-stream"
SAYS: Final = {
    200: "Done.",
    400: "What the caller can mend: the message says what.",
    401: "No API key, or a wrong one.",
    404: "No such model.",
    408: "The body, or the answer's beginning, did not come in the time that the request gave.",
    413: "The body is too large.",
    429: "The queue is full; try again later.",
    500: "The engine process ended while it ran this request.",
    503: "There is no engine at the moment; try again later.",
}


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """What every status of 400 and above comes with."""

    error: ErrorBody


def document(routes: Sequence[Endpoint], keyed: bool) -> dict[str, Any]:
    """`keyed`: whether API keys are asked for."""
    wanted: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [(Error, "serialization")]
    for each in routes:
        wanted += [(each.body, "validation")] if each.body else []
        models = (each.gives, each.streams, *(model for _, model in each.also))
        wanted += [(model, "serialization") for model in models if isinstance(model, type)]
    schemas, definitions = models_json_schema(list(dict.fromkeys(wanted)), ref_template="#/components/schemas/{model}")
    paths: dict[str, dict[str, Any]] = {}
    for each in routes:
        operation = _operation(each, schemas, keyed and not _is_open(each))
        paths.setdefault(each.path.replace(":path}", "}"), {})[each.method.lower()] = operation
    components: dict[str, Any] = {"schemas": definitions.get("$defs", {})}
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    info = {"title": "Penstock", "version": __version__, "description": "An OpenAI-compatible server."}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


def _is_open(endpoint: Endpoint) -> bool:
    return endpoint.method == "GET" and endpoint.path in OPEN


def _operation(endpoint: Endpoint, schemas: Schemas, keyed: bool) -> dict[str, Any]:
    name = f"{endpoint.method.lower()}{endpoint.path.split('{')[0].rstrip('/').replace('/', '_')}"
    made: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": name + "_one" * bool(endpoint.parameters),
        "responses": _responses(endpoint, schemas, keyed),
    }
    if endpoint.parameters:
        made["parameters"] = [
            {"name": each, "in": "path", "required": True, "description": about, "schema": {"type": "string"}}
            for each, about in endpoint.parameters
        ]
    if endpoint.body:
        content = {JSON: {"schema": schemas[endpoint.body, "validation"]}}
        made["requestBody"] = {"required": True, "content": content}
    if keyed:
        made["security"] = [{"key": []}]
    return made


def _responses(endpoint: Endpoint, schemas: Schemas, keyed: bool) -> dict[str, Any]:
    error = {JSON: {"schema": schemas[Error, "serialization"]}}
    statuses = {*endpoint.errors, *((401,) if keyed else ()), *((400, 408, 413) if endpoint.body else ())}
    statuses |= set() if endpoint.path in WATCHED else {503}  # while the server shuts down
    made = {status: {"description": SAYS[status], "content": error} for status in statuses}
    if endpoint.gives is not None:
        made[200] = {"description": SAYS[200], "content": _content(endpoint, schemas)}
    for status, model in endpoint.also:
        made[status] = {"description": SAYS[status], "content": {JSON: {"schema": schemas[model, "serialization"]}}}
    for status in {429, 503} & statuses:
        about = {"description": "Seconds to wait.", "schema": {"type": "integer"}}
        made[status]["headers"] = {"Retry-After": about}
    return {str(status): made[status] for status in sorted(made)}


def _content(endpoint: Endpoint, schemas: Schemas) -> dict[str, Any]:
    if isinstance(endpoint.gives, str):
        return {endpoint.gives: {"schema": {"type": "object" if endpoint.gives == JSON else "string"}}}
    assert endpoint.gives is not None
    content = {JSON: {"schema": schemas[endpoint.gives, "serialization"]}}
    if endpoint.streams:
        event = {"anyOf": [schemas[endpoint.streams, "serialization"], schemas[Error, "serialization"]]}
        payload = {"type": "string", "contentMediaType": JSON, "contentSchema": event}
        data = {"anyOf": [{"const": "[DONE]"}, payload]}
        content[EVENTS] = {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    return content


async def openapi(request: Request, serving: Serving) -> Response:
    return answer(document(serving.routes, bool(serving.config.api_keys)))


ROUTES: Final = (Endpoint("GET", "/openapi.json", openapi, "This document.", gives=JSON),)
