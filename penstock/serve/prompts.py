"""From what a request says to token ids: tokenising and rendering of chat templates, off the event loop where long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Final, TypeVar

from penstock.errors import LengthError, PromptError, TokenizerError
from penstock.runtime.prompt import prompt_numbers
from penstock.serve.schema.chat import ChatRequest
from penstock.serve.serving import Texts, aside
from penstock.text import Tokenizer
from penstock.text.detokenize import is_byte_level

_SECONDS: Final = 10.0  # of rendering; the sandbox itself gives one rendering less
_TEMPLATES: Final = ThreadPoolExecutor(2, "chat template")  # so that slow templates wait for each other alone
T = TypeVar("T")


async def encode(tokenizer: Tokenizer, texts: Sequence[str], special: bool, most: int) -> list[list[int]]:
    """The ids of texts. Raises LengthError for one that cannot be as short as `most` tokens, PromptError, and
    TokenizerError."""
    for text in texts:
        _refuse_long(text, tokenizer, most)
    return await aside(sum(map(len, texts)), tokenizer.encode_batch, texts, special)


async def prompt_ids(
    given: Sequence[str] | Sequence[Sequence[int]], special: bool, tokenizer: Tokenizer, facts: Mapping[str, Any]
) -> list[list[int]]:
    """Of prompts, texts or ids, each as short as the engine takes. Raises as `encode`, and PromptError for
    ids that it does not have."""
    most = int(facts["max_seq_len"])
    if isinstance(given[0], str):
        ids = await encode(tokenizer, [str(each) for each in given], special, most)
    else:
        ids = [[*map(int, each)] for each in given]
    for each in ids:
        check_length(len(each), most)
        prompt_numbers(each, int(facts["vocab_size"]))
    return ids


def check_length(length: int, most: int) -> None:
    """`most`: tokens of a request, of which one has to be left. Raises LengthError."""
    if length >= most:
        raise LengthError(f"the prompt has {length} tokens, the limit is {most - 1}; shorten it")


async def chat_text(texts: Texts, body: ChatRequest) -> str:
    """The prompt that the model's chat template makes of a conversation.

    What a message spells as a special token becomes one, as with Hugging Face and vLLM: the text of the whole
    conversation is tokenised, and of a template's own marks some are meant to come from messages.

    Raises PromptError for what it cannot render, and where there is none.
    """
    template = texts.template
    if template is None:
        raise PromptError(
            f"the model's chat template cannot be used: {texts.template_error}; use /v1/completions"
            if texts.template_error
            else "the model has no chat template, so it takes no messages; use /v1/completions, or serve a chat model"
        )
    asked = body.asked_tools()
    tools = None if asked is None else asked.plain
    messages, variables = [each.plain() for each in body.messages], body.chat_template_kwargs or {}
    for each in messages:
        if each["role"] == "developer" and "developer" not in template.source(tools is not None):
            each["role"] = "system"  # by its older name
    begins = body.add_generation_prompt is not False and not body.continue_final_message
    mark, said = "", messages[-1]["content"]
    if body.continue_final_message:
        mark = _unused(messages)
        messages[-1]["content"] = said + mark
    text = await _aside(lambda: template.render(messages, begins, tools, **variables))
    return _until(text, mark, said) if mark else text


def _unused(messages: Sequence[dict[str, Any]]) -> str:
    """A text that none of the messages holds."""
    mark = "<<end of the last message>>"
    while any(mark in message["content"] for message in messages):
        mark += ">"
    return mark


def _until(text: str, mark: str, said: str) -> str:
    """A rendered text until its last message's end, so that the model goes on with it."""
    before, found, _ = text.rpartition(mark)
    if not found or not before.endswith(said.lstrip()):
        raise PromptError("the model's chat template does not end with the last message's text, so it cannot be gone "
                          "on with; leave continue_final_message out")  # fmt: skip
    return before


async def _aside(work: Callable[[], T]) -> T:
    loop = asyncio.get_running_loop()
    try:
        return await asyncio.wait_for(loop.run_in_executor(_TEMPLATES, work), _SECONDS)
    except TimeoutError:
        raise PromptError(f"the model's chat template took over {_SECONDS:g} s; send fewer messages") from None
    except TokenizerError as error:
        raise PromptError(f"these messages cannot be rendered: {error}") from error


def _refuse_long(text: str, tokenizer: Tokenizer, most: int) -> None:
    longest = _longest(tokenizer)
    if longest and len(text) > most * longest:
        raise LengthError(
            f"a prompt of {len(text)} characters has more than {len(text) // longest} tokens, the limit is {most}; "
            f"shorten it"
        )


@lru_cache(4)
def _longest(tokenizer: Tokenizer) -> int:
    """Characters that a token may stand for at most; 0 where that cannot be told: where text is changed first."""
    if tokenizer.backend.normalizer is not None or not is_byte_level(tokenizer):
        return 0
    return max(map(len, tokenizer.backend.get_vocab(with_added_tokens=True)))
