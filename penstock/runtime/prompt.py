"""Prompts as callers give them: text or token ids, checked and made the numbers that steps upload."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np

from penstock.errors import OptionError, PromptError, SamplingError
from penstock.runtime.sampling.params import SamplingParams
from penstock.runtime.upload import Numbers
from penstock.text.tokenizer import Tokenizer

Prompt = str | Mapping[str, Sequence[int]]


def prompt_numbers(ids: Sequence[int], vocab_size: int) -> Numbers:
    """Raises PromptError for an empty prompt, or for the first id that is no integer or outside the vocabulary."""
    if not ids:
        raise PromptError("the prompt is empty; give at least one token")
    if set(map(type, ids)) != {int}:  # numpy would take True for 1
        _refuse_first(ids, vocab_size)
    try:
        numbers = np.fromiter(ids, np.int32, len(ids))
    except OverflowError:
        _refuse_first(ids, vocab_size)
        raise
    if np.maximum.reduce(numbers.view(np.uint32)) >= vocab_size:  # a negative one is large as an unsigned number
        _refuse_first(ids, vocab_size)
    return numbers


def prefix_length(ids: Sequence[int], end: int, marks: Sequence[int]) -> int:
    """How many first tokens of a prompt see each other: all before its first `end`. The last of them is the mark that
    the answer stands for: the first place of the first of `marks` that the prompt has. Raises PromptError."""
    remedy = f"end it with [{marks[0]}, {end}], as the model's tokenizer does"
    if end not in ids:
        raise PromptError(f"the prompt has no token {end}, with which the model's answer begins; {remedy}")
    length = ids.index(end)
    mark = next((mark for mark in marks if mark in ids), None)
    if mark is None or ids.index(mark) != length - 1:
        where = "nowhere" if mark is None else f"first at position {ids.index(mark)}"
        raise PromptError(
            f"the prompt has token {end} at position {length}, and the mark of what it is the answer to (one of "
            f"{[*marks]}) {where}, not right before; {remedy}"
        )
    return length


def _refuse_first(ids: Sequence[int], vocab_size: int) -> None:
    for index, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool):
            raise PromptError(f"token id {token!r} at position {index} is a {type(token).__name__}; give integers")
        if not 0 <= token < vocab_size:
            raise PromptError(
                f"token id {token} at position {index} is outside the vocabulary of {vocab_size}: "
                f"ids go from 0 to {vocab_size - 1}"
            )


def read_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> tuple[str | None, tuple[int, ...]]:
    """Its text, where it came as such, and its token ids. Raises PromptError for anything else."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise PromptError("the prompt is text and there is no tokenizer; give {'prompt_token_ids': [...]}")
        return prompt, tuple(tokenizer.encode(prompt))
    if not isinstance(prompt, Mapping) or set(prompt) != {"prompt_token_ids"}:
        raise PromptError(f"prompt {str(prompt)[:80]!r} is neither text nor {{'prompt_token_ids': [...]}}")
    ids: object = prompt["prompt_token_ids"]
    if isinstance(ids, str | bytes | bytearray | Set) or not isinstance(ids, Iterable):
        raise PromptError(f"prompt_token_ids={str(ids)[:80]!r} is a {type(ids).__name__}; give a list of integers")
    return None, tuple(ids)


def prompts_of(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One, or several, as a list."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise PromptError(f"prompts={prompts!r} is a {type(prompts).__name__}; give text, token ids, or a list of them")
    return list(prompts)


def params_of(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    """For each of so many prompts. Raises SamplingError, OptionError."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence):
        raise SamplingError(f"sampling_params={params!r} is a {type(params).__name__}; give one, or one a prompt")
    if len(params) != count:
        raise OptionError(f"{len(params)} sampling_params were given for {count} prompts; give one, or one for each")
    return params
