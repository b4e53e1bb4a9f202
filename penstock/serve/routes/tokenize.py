"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, FailFast, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from penstock.errors import PromptError
from penstock.serve.answers import answer
from penstock.serve.body import Body, read_json
from penstock.serve.prompts import chat_text
from penstock.serve.schema.chat import MOST_MESSAGES, ChatRequest, Message
from penstock.serve.serving import Endpoint, Serving, aside


class TokenizeRequest(Body):
    """A text, or a conversation as the model's chat template writes it; special tokens are added to the first alone,
    where nothing is said."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MOST_MESSAGES)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _either(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self

    def chat(self) -> ChatRequest:
        names = "messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"
        return ChatRequest.model_construct(**{name: getattr(self, name) for name in names})


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
    text = await chat_text(await serving.texts(), asked.chat()) if asked.prompt is None else asked.prompt
    special = asked.prompt is not None if asked.add_special_tokens is None else asked.add_special_tokens
    most = serving.link.facts["max_seq_len"]

    def told() -> Response:
        ids = tokenizer.encode(text, special)
        strings = [tokenizer.id_to_token(each) or "" for each in ids] if asked.return_token_strs else None
        return answer({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": strings})

    return await aside(len(text), told)


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
    Endpoint("POST", "/tokenize", tokenize, "The ids of a text.", TokenizeRequest, TokenizeResponse, (404,)),
    Endpoint("POST", "/detokenize", detokenize, "The text of ids.", DetokenizeRequest, DetokenizeResponse, (404,)),
)
