"""POST /v1/embeddings: what it takes and gives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from penstock.serve.body import Body
from penstock.serve.schema.base import MOST_NAME
from penstock.serve.schema.completions import FORMS, Prompts, listed


class EmbeddingRequest(Body):
    """Texts whose vectors are wanted. dimensions: only the first so many numbers of each, made length 1 again."""

    input: Annotated[Any, BeforeValidator(listed, json_schema_input_type=FORMS)]
    model: str | None = Field(None, max_length=MOST_NAME)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    user: str | None = Field(None, max_length=MOST_NAME)
    add_special_tokens: bool | None = True
    priority: Annotated[int, Field(ge=-(2**31) + 1, le=2**31 - 1)] = 0
    cache_salt: str | None = Field(None, min_length=1, max_length=MOST_NAME)
    timeout: Annotated[float, Field(gt=0, le=1e9)] | None = None
    queue_timeout: Annotated[float, Field(gt=0, le=1e9)] | None = None

    @property
    def inputs(self) -> Prompts:
        found: Prompts = self.input
        return found


class Embedding(Body):
    """One vector: numbers, or their 32 bits each, little endian, as base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Body):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Body):
    """The vectors, in the order of the input."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
