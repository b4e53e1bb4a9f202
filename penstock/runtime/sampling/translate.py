"""From sampling parameters to what slots hold: token ids where a request gave text, and the limits of a vocabulary."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator

from penstock.errors import SamplingError
from penstock.ir.ops.control import LISTS, Controls
from penstock.ir.ops.state import CONTROLS
from penstock.runtime.sampling.params import SamplingParams
from penstock.runtime.schedule.request import Request
from penstock.text.tokenizer import Tokenizer


def fields_of(params: SamplingParams, sample: int = 0) -> dict[str, float]:
    """Of the parameters, filled, those that are a slot's FIELDS; for the sample of that number."""
    assert params.temperature is not None and params.top_k is not None
    assert params.top_p is not None and params.min_p is not None
    return {
        "temperature": params.temperature, "top_k": max(params.top_k, 0), "top_p": params.top_p,
        "min_p": params.min_p, "seed": fold_seed(params.seed, sample),
    }  # fmt: skip


def fold_seed(seed: int | None, sample: int = 0) -> int:
    """31 bits from a caller's seed and the index of the sample; fresh ones where no seed was given."""
    if seed is None:
        return secrets.randbits(31)
    return int.from_bytes(hashlib.sha256(f"{seed}.{sample}".encode()).digest()[:4], "big") >> 1


def controls_of(params: SamplingParams, request: Request, vocab_size: int, tokenizer: Tokenizer | None) -> Controls:
    """What the slot holds beside. Raises SamplingError for a token outside the vocabulary, for bad words without a
    tokenizer to spell them, and where all that does not fit a slot."""
    assert params.repetition_penalty is not None and params.no_repeat_ngram_size is not None
    bias = tuple(sorted((params.logit_bias or {}).items()))
    if bias and bias[-1][0] >= vocab_size:
        raise SamplingError(
            f"logit_bias names token {bias[-1][0]}, which is outside the vocabulary of {vocab_size}: ids go from 0 to "
            f"{vocab_size - 1}"
        )
    ends = sorted(token for token in request.end_ids if token < vocab_size) if params.min_tokens else ()
    controls = Controls(
        request.prompt_length, request.prompt_length + params.min_tokens, params.repetition_penalty,
        params.presence_penalty, params.frequency_penalty, params.no_repeat_ngram_size, tuple(ends), bias,
        spellings(params.bad_words, tokenizer, vocab_size), num_logprobs(params),
    )  # fmt: skip
    size = LISTS + len(ends) + 2 * len(bias) + sum(1 + len(word) for word in controls.bad_words)
    if size > CONTROLS:
        raise SamplingError(
            f"logit_bias has {len(bias)} tokens, bad_words {len(controls.bad_words)} spellings of "
            f"{sum(map(len, controls.bad_words))} tokens, and {len(ends)} tokens end the text: that takes "
            f"{size - LISTS} numbers, and a request has room for {CONTROLS - LISTS} (2 for each bias); give fewer"
        )
    return controls


def num_logprobs(params: SamplingParams) -> int:
    """As a slot counts them: one more than of the likeliest, for the chosen one; 0 where nobody asks."""
    asked = [n for n in (params.logprobs, params.prompt_logprobs) if n is not None]
    if params.best_of is not None and params.best_of > params.n:
        asked.append(0)  # the best are those whose tokens were likeliest
    return 1 + max(asked) if asked else 0


def spellings(words: tuple[str, ...], tokenizer: Tokenizer | None, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Each word as the tokenizer writes it at the beginning of a text, and behind a space. A spelling with a token that
    the model does not have needs no ban."""
    if words and tokenizer is None:
        raise SamplingError(
            f"bad_words={words!r} needs a tokenizer, and there is none; leave it out, or use logit_bias"
        )
    every = (spelling for word in words for spelling in _spelt(word, tokenizer))
    return tuple(dict.fromkeys(spelling for spelling in every if max(spelling) < vocab_size))


def _spelt(word: str, tokenizer: Tokenizer | None) -> Iterator[tuple[int, ...]]:
    assert tokenizer is not None
    for text in (word, f" {word.lstrip()}"):
        if ids := tokenizer.encode(text, add_special_tokens=False):
            yield tuple(ids)
