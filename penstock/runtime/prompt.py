"""A prompt's token ids, checked and made the numbers that steps upload."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock.errors import PromptError
from penstock.runtime.upload import Numbers


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


def _refuse_first(ids: Sequence[int], vocab_size: int) -> None:
    for index, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool):
            raise PromptError(f"token id {token!r} at position {index} is a {type(token).__name__}; give integers")
        if not 0 <= token < vocab_size:
            raise PromptError(
                f"token id {token} at position {index} is outside the vocabulary of {vocab_size}: "
                f"ids go from 0 to {vocab_size - 1}"
            )
