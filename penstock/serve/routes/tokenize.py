"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, FailFast
from starlette.requests import Request
from starlette.responses import Response

from penstock.errors import PromptError
from penstock.serve.answers import answer
from penstock.serve.body import Body, read_json
from penstock.serve.serving import Endpoint, Serving, aside


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[list[int], FailFast()]


class DetokenizeResponse(BaseModel):
    prompt: str


async def tokenize(request: Request, serving: Serving) -> Response:
    asked = await read_json(request, TokenizeRequest)
    serving.check_model(asked.model)
    tokenizer = (await serving.texts()).tokenizer
    ids = await aside(len(asked.prompt), tokenizer.encode, asked.prompt, asked.add_special_tokens)
    strings = [tokenizer.id_to_token(each) or "" for each in ids] if asked.return_token_strs else None
    most = serving.link.facts["max_seq_len"]
    return answer({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": strings})


async def detokenize(request: Request, serving: Serving) -> Response:
    asked = await read_json(request, DetokenizeRequest)
    serving.check_model(asked.model)
    tokenizer = (await serving.texts()).tokenizer
    most = serving.link.facts["vocab_size"]
    wrong = next((each for each in asked.tokens if not 0 <= each < most), None)
    if wrong is not None:
        raise PromptError(f"token id {str(wrong)[:40]} is outside the vocabulary; ids go from 0 to {most - 1}")
    return answer({"prompt": await aside(len(asked.tokens), tokenizer.decode, asked.tokens, False)})


ROUTES: Final = (
    Endpoint("POST", "/tokenize", tokenize, "The ids of a text.", TokenizeRequest, TokenizeResponse, (400, 404, 503)),
    Endpoint(
        "POST", "/detokenize", detokenize, "The text of ids.", DetokenizeRequest, DetokenizeResponse, (400, 404, 503)
    ),
)
