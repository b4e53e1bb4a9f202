"""POST /v1/chat/completions: what it takes and gives."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from penstock.ir.ops.control import MOST_LOGPROBS
from penstock.runtime.sampling.params import SamplingParams
from penstock.serve.body import Body
from penstock.serve.schema.base import MOST_NAME, Sampling, refused
from penstock.serve.schema.completions import PromptLogprob, Usage
from penstock.serve.tools.schema import Tooled

MOST_MESSAGES: Final = 10_000
MOST_CALLS: Final = 128
MOST_KWARGS: Final = 32
MOST_KWARGS_CHARACTERS: Final = 1 << 16
# What rendering sets itself.
_TAKEN: Final = frozenset({"self", "messages", "tools", "add_generation_prompt", "continue_final_message", "template",
                           "chat_template", "raise_exception", "strftime_now", "tokenize"})  # fmt: skip


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _parts(value: Any) -> Any:
    for each in value if isinstance(value, list) else ():
        kind = each.get("type") if isinstance(each, dict) else None
        if isinstance(kind, str) and kind not in ("text", "refusal"):
            raise ValueError(f"a part of type {kind[:40]!r} is not taken: this model reads text alone; send 'text'")
    return value


Content = Annotated[str | list[TextPart] | None, BeforeValidator(_parts)]


class CalledFunction(Body):
    """`arguments`: the text of a JSON object."""

    name: str = Field(max_length=MOST_NAME)
    arguments: str


class ToolCall(Body):
    """A call that the model made."""

    id: str = Field(max_length=MOST_NAME)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """Of any role; what a role needs is checked here, what it means is the template's."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = Field(None, max_length=MOST_NAME)
    tool_calls: list[ToolCall] | None = Field(None, max_length=MOST_CALLS)
    tool_call_id: str | None = Field(None, max_length=MOST_NAME)
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    # In the answers of OpenAI's client, which are sent back as they came.
    annotations: None = None
    audio: Annotated[None, refused("this model speaks text alone")] = None
    function_call: Annotated[None, refused("send tool_calls")] = None

    @model_validator(mode="after")
    def _of_its_role(self) -> Self:
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content or self.reasoning):
            raise ValueError(f"tool_calls and reasoning are an assistant's, this message is of role {self.role!r}")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is required, but beside an assistant's tool_calls")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role 'tool' needs the tool_call_id of what it answers")
        self.plain()
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def plain(self) -> dict[str, Any]:
        """As templates read it: content is text, the arguments of calls are objects."""
        found: dict[str, Any] = {"role": self.role, "content": self.text}
        found |= {"name": self.name} if self.name is not None else {}
        found |= {"tool_call_id": self.tool_call_id} if self.tool_call_id is not None else {}
        if (reasoning := self.reasoning_content or self.reasoning) is not None:
            found["reasoning_content"] = reasoning
        if self.tool_calls:
            found["tool_calls"] = [_plain_call(call) for call in self.tool_calls]
        return found


def _plain_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError("tool_calls: the arguments of a call are the text of a JSON object; send that")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


class ChatRequest(Tooled, Sampling):
    """A conversation to go on with."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=MOST_KWARGS)
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    audio: Annotated[None, refused("this model speaks text alone, so leave it out")] = None
    chat_template: Annotated[None, refused("the model's own is used, so leave it out")] = None
    documents: Annotated[None, refused("write them into a message")] = None
    echo: Annotated[Literal[False] | None, refused("ask /v1/completions, or continue_final_message", False)] = None
    function_call: Annotated[None, refused("send tool_choice")] = None
    functions: Annotated[None, refused("send tools")] = None
    include_reasoning: Annotated[
        Literal[True] | None, refused("it stands in reasoning_content, apart from the text", True)
    ] = None
    mm_processor_kwargs: Annotated[None, refused("this model reads text alone, so leave it out")] = None
    moderation: Annotated[None, refused("nothing is moderated, so leave it out")] = None
    prediction: Annotated[None, refused("leave it out, the text is the same")] = None
    prompt_cache_options: Annotated[None, refused("equal prefixes are found by themselves, so leave it out")] = None
    prompt_cache_retention: Annotated[
        Literal["in_memory"] | None,
        refused("prefixes are kept until their room is needed, so leave it out", "in_memory"),
    ] = None
    reasoning_effort: Annotated[None, refused("a template that knows it takes it by chat_template_kwargs")] = None
    verbosity: Annotated[Literal["medium"] | None, refused("say so in a message", "medium")] = None
    web_search_options: Annotated[None, refused("nothing is searched; send tools")] = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_tokens == 0:
            raise ValueError("max_tokens=0 asks for nothing; give at least 1")
        if None not in (both := (self.max_tokens, self.max_completion_tokens)) and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true alone; set that, or leave it out")
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("add_generation_prompt begins a message and continue_final_message goes on with the last; "
                             "give one of them")  # fmt: skip
        _check_kwargs(self.chat_template_kwargs)
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling(self, room: int) -> SamplingParams:
        """`room`: how many tokens there may be behind the prompt, which is what is asked for by default."""
        top = (self.top_logprobs or 0) if self.logprobs else None
        return self.params(max_tokens=self.most_tokens or max(1, room), logprobs=top)


def _check_kwargs(given: dict[str, Any] | None) -> None:
    for name in given or ():
        if name in _TAKEN or not name.isidentifier() or name.startswith("_") or len(name) > 64:
            raise ValueError(f"chat_template_kwargs: {name[:64]!r} is no name for a variable of a template, or the "
                             f"server's own; leave it out")  # fmt: skip
    if given and len(json.dumps(given)) > MOST_KWARGS_CHARACTERS:
        raise ValueError(f"chat_template_kwargs: at most {MOST_KWARGS_CHARACTERS} characters of JSON; give less")


class TopLogprob(Body):
    """One of the likeliest tokens. `bytes`: its own, as UTF-8; part of a character maybe."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """A token of the text."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Body):
    content: list[TokenLogprob] | None
    refusal: None = None


class AnswerMessage(Body):
    """What the model said; its reasoning under both names that clients know."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChoice(Body):
    """One text. `finish_reason` "length" with `stop_reason` "timeout": its deadline came."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: str | int | None = None


class ChatCompletion(Body):
    """The answer."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChatChoice]
    usage: Usage | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class DeltaFunction(Body):
    name: str | None = None
    arguments: str | None = None


class DeltaCall(Body):
    """A call as it comes: id and name first, then pieces of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: DeltaFunction | None = None


class Delta(Body):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[DeltaCall] | None = None


class ChunkChoice(Body):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class ChatChunk(Body):
    """An event of a stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChunkChoice]
    usage: Usage | None = None
