"""POST /v1/completions: what it takes and gives."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from penstock.ir.ops.control import MOST_LOGPROBS
from penstock.runtime.sampling.params import SamplingParams
from penstock.serve.body import Body
from penstock.serve.schema.base import Sampling

Prompts = list[str] | list[list[int]]


def listed(value: Any) -> Prompts:
    """Whatever form it has, a list of prompts. By hand: a union of lists would tell of each token what it is not."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("give text, a list of token ids, or a list of either, not empty")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [value]
    if kinds == {str} or (kinds == {list} and all(each and set(map(type, each)) == {int} for each in value)):
        return value
    raise ValueError("give text, a list of token ids, or a list of either, not empty and not mixed")


FORMS = str | list[str] | list[int] | list[list[int]]


class CompletionRequest(Sampling):
    """Text to go on from."""

    prompt: Annotated[Any, BeforeValidator(listed, json_schema_input_type=FORMS)]
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    add_special_tokens: bool | None = True
    suffix: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.suffix:
            raise ValueError("suffix: no model here fills in the middle; leave it out")
        if self.max_tokens == 0 and not (self.echo or self.prompt_logprobs is not None):
            raise ValueError("max_tokens=0 asks for nothing; give at least 1, or echo=true")
        return self

    @property
    def prompts(self) -> Prompts:
        found: Prompts = self.prompt
        return found

    def sampling(self) -> SamplingParams:
        """Where no token is wanted, one is asked for and dropped: the engine scores prompts on the way to it."""
        more: dict[str, Any] = {"logprobs": self.logprobs}
        if self.max_tokens is not None:
            more["max_tokens"] = max(1, self.max_tokens)
        if self.echo and self.logprobs is not None:
            more["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return self.params(**more)


class CachedTokens(Body):
    """Of the prompt, those whose keys and values were known."""

    cached_tokens: int


class Usage(Body):
    """Tokens of a request, of all its prompts and texts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class CompletionLogprobs(Body):
    """A row a token. A token that is part of a character is written as `bytes:\\xf0\\x9f`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Body):
    """Of one token id at a place of the prompt."""

    logprob: float
    decoded_token: str


class CompletionChoice(Body):
    """One text. `finish_reason` "length" with `stop_reason` "timeout": its deadline came."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class Completion(Body):
    """The answer, and an event of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[CompletionChoice]
    usage: Usage | None = None
