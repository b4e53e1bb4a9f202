"""POST /v1/embeddings, where the engine was built to give vectors."""

from __future__ import annotations

import base64
import secrets
import time
from typing import Any, Final

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from penstock.runtime.embedding import Vector, normalized
from penstock.serve.answers import answer
from penstock.serve.app import while_connected
from penstock.serve.body import read_json
from penstock.serve.errors import RequestError, too_late
from penstock.serve.generate import admission, has_deadline, together
from penstock.serve.link import Reply
from penstock.serve.prompts import prompt_ids
from penstock.serve.schema.embeddings import EmbeddingRequest, Embeddings
from penstock.serve.serving import Endpoint, Serving, Watcher
from penstock.serve.wire import Submit


async def embed(request: Request, serving: Serving) -> Response:
    """The handler."""
    body = await read_json(request, EmbeddingRequest)
    model = serving.check_model(body.model)
    _check(body, serving)
    tokenizer = (await serving.texts()).tokenizer
    ids = await prompt_ids(body.inputs, body.add_special_tokens is not False, tokenizer, serving.link.facts)
    work = (_vector(each, serving, request, has_deadline(body)) for each in _submits(ids, body, serving))
    vectors = await while_connected(request, together(work))
    count = sum(map(len, ids))
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, body)} for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return answer({"object": "list", "model": model, "data": data, "usage": usage})


def _check(body: EmbeddingRequest, serving: Serving) -> None:
    facts, config = serving.link.facts, serving.config
    if not facts["embeds"]:
        raise RequestError(
            400, "this server's engine generates text and gives no vectors; start one with --task embed", "unsupported"
        )
    if len(body.inputs) > config.max_prompts:
        raise RequestError(
            400, f"input: {len(body.inputs)} texts, at most {config.max_prompts}; send fewer", "invalid_value", "input"
        )
    if body.dimensions is not None and body.dimensions > (size := int(facts["embedding_size"])):
        raise RequestError(
            400,
            f"dimensions={body.dimensions}, but the model's vectors have {size}; ask for fewer",
            "invalid_value",
            "dimensions",
        )


def _submits(ids: list[list[int]], body: EmbeddingRequest, serving: Serving) -> list[Submit]:
    id, limits = f"embd-{secrets.token_hex(12)}", admission(body, serving.config)
    return [Submit(f"{id}-{i}", each, {}, time.monotonic(), *limits, embed=True) for i, each in enumerate(ids)]


async def _vector(new: Submit, serving: Serving, request: Request, own_deadline: bool) -> Vector:
    reply, watcher = serving.submit(request, new)
    error: BaseException | None = None
    try:
        return await _heard(reply, watcher, own_deadline)
    except BaseException as raised:
        error = raised
        raise
    finally:
        reply.abort()  # of one that has ended: nothing
        if watcher is not None:
            watcher.ended(error)


async def _heard(reply: Reply, watcher: Watcher | None, own_deadline: bool) -> Vector:
    while True:
        parts = await reply.parts()
        if watcher is not None:
            watcher.parts(parts)
        for part in parts:
            if part.vector is not None:
                return np.frombuffer(part.vector, "<f4")
            if part.finish is not None:
                raise too_late("vector", own_deadline)


def _written(vector: Vector, body: EmbeddingRequest) -> Any:
    if body.dimensions is not None:
        vector = normalized(vector[: body.dimensions])
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


ROUTES: Final = (
    Endpoint(
        "POST", "/v1/embeddings", embed, "Vectors of texts.", EmbeddingRequest, Embeddings,
        (404, 429, 500),
    ),
)  # fmt: skip
