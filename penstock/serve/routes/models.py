"""/v1/models: what requests may call the model. /version. Adapters, which are not built yet."""

from __future__ import annotations

from typing import Any, Final, Literal, NoReturn

from pydantic import BaseModel, JsonValue
from starlette.requests import Request
from starlette.responses import Response

from penstock.serve.answers import answer
from penstock.serve.body import Body, read_json
from penstock.serve.serving import Endpoint, Serving
from penstock.unsupported import refuse
from penstock.version import __version__


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "penstock"
    root: str | None  # the model's own name
    parent: None = None
    max_model_len: int | None  # tokens of a request, prompt included


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Version(BaseModel):
    version: str


class Adapter(Body):
    """What adapters will be loaded by."""

    lora_name: str
    lora_path: JsonValue = None
    lora_int_id: JsonValue = None


def _model(serving: Serving, name: str) -> Model:
    facts: Any = serving.link.facts
    return Model(id=name, created=serving.created, root=facts.get("model"), max_model_len=facts.get("max_seq_len"))


async def models(request: Request, serving: Serving) -> Response:
    serving.check_model(None)
    return answer(ModelList(data=[_model(serving, name) for name in serving.model_names]))


async def model(request: Request, serving: Serving) -> Response:
    return answer(_model(serving, serving.check_model(request.path_params["model"])))


async def version(request: Request, serving: Serving) -> Response:
    return answer(Version(version=__version__))


async def adapters(request: Request, serving: Serving) -> NoReturn:
    await read_json(request, Adapter)
    refuse(request.url.path)


_BY_NAME: Final = (("model", "A name of /v1/models."),)
ROUTES: Final = (
    Endpoint("GET", "/v1/models", models, "The names of the model.", gives=ModelList),
    Endpoint("GET", "/v1/models/{model:path}", model, "One of them.", gives=Model, errors=(404,), parameters=_BY_NAME),
    Endpoint("GET", "/version", version, "The server's version.", gives=Version),
    Endpoint("POST", "/v1/load_lora_adapter", adapters, "Not built yet.", Adapter),
    Endpoint("POST", "/v1/unload_lora_adapter", adapters, "Not built yet.", Adapter),
)
