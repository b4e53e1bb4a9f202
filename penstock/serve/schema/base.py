"""What completions and chats have in common: sampling, deadlines, grammars, streaming."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from penstock.runtime.sampling.params import SamplingParams
from penstock.serve.body import Body, Refused

MOST_STOPS: Final = 128  # whatever max_stop says
MOST_STOP_CHARACTERS: Final = 256  # of each: looking for them takes time with every token
MOST_WORDS: Final = 128
MOST_IDS: Final = 1024  # stop_token_ids, biases
MOST_NAME: Final = 256  # characters
MOST_LABELS: Final = 16

# Fields that SamplingParams has by the same name and meaning.
_SAMPLING: Final = (
    "n", "best_of", "use_beam_search", "beam_width", "length_penalty", "early_stopping", "min_tokens", "temperature",
    "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size",
    "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "bad_words", "logit_bias", "ignore_eos",
    "prompt_logprobs", "skip_special_tokens",
)  # fmt: skip


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], BeforeValidator(_listed, json_schema_input_type=str | list[Stop]),
                  Field(max_length=MOST_STOPS)]  # fmt: skip
Word = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


def refused(remedy: str, *neutral: object) -> Refused:
    """Of a field that is known, and asks for what is not done: what to do instead. Null and `neutral` ask for
    nothing."""
    known = [(type(each), each) for each in neutral]  # False is no 0

    def check(value: Any) -> Any:
        if value is not None and (type(value), value) not in known:
            raise ValueError(f"is not taken here; {remedy}")
        return value

    return Refused(check)


class StreamOptions(Body):
    """`continuous_usage_stats`: the counts so far in every event."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Annotated[Literal[False] | None, refused("events are as long as what they say", False)] = None


class JsonSchemaFormat(Body):
    """OpenAI's wrapping of a schema. `strict`: taken, a schema is always enforced."""

    name: str = Field(max_length=MOST_NAME)
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the text has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("response_format: json_schema goes with type 'json_schema', and with no other")
        return self


class StructuredOutputs(Body):
    """As vLLM's; exactly one."""

    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Labels(Body):
    """What asks for nothing: taken, without effect."""

    user: str | None = Field(None, max_length=MOST_NAME)
    safety_identifier: str | None = Field(None, max_length=MOST_NAME)
    prompt_cache_key: str | None = Field(None, max_length=MOST_NAME)
    metadata: dict[str, str] | None = Field(None, max_length=MOST_LABELS)
    store: Annotated[Literal[False] | None, refused("nothing is kept, so leave it out", False)] = None
    service_tier: Annotated[
        Literal["auto", "default"] | None, refused("there are no tiers, but priority", "auto", "default")
    ] = None


class Undone(Body):
    """What vLLM does and this server does not: refused by name."""

    allowed_token_ids: Annotated[None, refused("hold the text by structured_outputs, or say logit_bias")] = None
    guided_decoding_backend: Annotated[None, refused("there is one, so leave it out")] = None
    guided_whitespace_pattern: Annotated[None, refused("say the text by guided_grammar")] = None
    kv_transfer_params: Annotated[None, refused("prompts are computed where texts are, so leave it out")] = None
    logits_processors: Annotated[None, refused("no code is run; say logit_bias or bad_words")] = None
    request_id: Annotated[None, refused("send it as the header x-request-id")] = None
    return_token_ids: Annotated[Literal[False] | None, refused("ask /tokenize for the ids of a text", False)] = None
    return_tokens_as_token_ids: Annotated[
        Literal[False] | None, refused("ask /tokenize for the ids of a text", False)
    ] = None
    spaces_between_special_tokens: Annotated[
        Literal[True] | None, refused("texts are as the tokenizer writes them, so leave it out", True)
    ] = None
    truncate_prompt_tokens: Annotated[None, refused("nothing is cut unseen; send a shorter prompt")] = None


class Sampling(Labels, Undone):
    """Of any request for text. The fields that OpenAI does not have are named as vLLM's."""

    model: str | None = Field(None, max_length=MOST_NAME)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Stops | None = None
    logit_bias: dict[TokenKey, float] | None = Field(None, max_length=MOST_IDS)
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_tokens: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MOST_IDS)
    include_stop_str_in_output: bool | None = None
    bad_words: list[Word] | None = Field(None, max_length=MOST_WORDS)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    use_beam_search: bool | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    prompt_logprobs: int | None = None
    priority: Annotated[int, Field(ge=-(2**31) + 1, le=2**31 - 1)] = 0
    cache_salt: str | None = Field(None, min_length=1, max_length=MOST_NAME)
    timeout: Annotated[float, Field(gt=0, le=1e9)] | None = None
    queue_timeout: Annotated[float, Field(gt=0, le=1e9)] | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _in_itself(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true alone; leave it out")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs comes with the whole answer; leave it out, or stream=false")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError("best_of above n cannot be streamed: which are the best is known at the end; stream=false")
        self.guided()
        return self

    @property
    def counted(self) -> StreamOptions:
        """What a stream tells of its counts."""
        return self.stream_options or StreamOptions()

    def params(self, **more: Any) -> SamplingParams:
        """All that it says of sampling, and `more`. Raises SamplingError for what is out of range."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if "logit_bias" in given:
            given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
        return SamplingParams(**given | more)

    def guided(self) -> dict[str, Any]:
        """The arguments of GuidedDecoding; empty where the text is free. Raises ValueError for several."""
        found = [each for each in (self._formatted(), self._guided(), self._structured()) if each]
        if len(found) > 1 or any(len(each) > 1 for each in found):
            raise ValueError("several forms for one text; give one, by response_format, guided_* or structured_outputs")
        return found[0] if found else {}

    def _formatted(self) -> dict[str, Any]:
        form = self.response_format
        if form is None or form.type == "text":
            return {}
        if form.json_schema is None or form.json_schema.json_schema is None:
            return {"json_object": True}
        return {"json": _text_of(form.json_schema.json_schema)}

    def _guided(self) -> dict[str, Any]:
        schema = None if self.guided_json is None else _text_of(self.guided_json)
        return _asked(schema, self.guided_regex, self.guided_choice, self.guided_grammar)

    def _structured(self) -> dict[str, Any]:
        form = self.structured_outputs
        if form is None:
            return {}
        schema = None if form.json_ is None else _text_of(form.json_)
        found = _asked(schema, form.regex, form.choice, form.grammar)
        found |= {"json_object": True} if form.json_object else {}
        if not found:
            raise ValueError("structured_outputs holds nothing; give one of json, json_object, regex, choice, grammar")
        return found


def _asked(schema: str | None, regex: str | None, choice: list[str] | None, grammar: str | None) -> dict[str, Any]:
    given = {"json": schema, "regex": regex, "choice": choice and tuple(choice), "grammar": grammar}
    return {name: value for name, value in given.items() if value is not None}


def _text_of(schema: dict[str, Any] | str | bool) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
