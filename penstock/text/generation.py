"""What a model's files say about generating: which ids end a text, and the sampling defaults."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError
from penstock.text.files import read_json

Allowed = tuple[Callable[[Any], bool], str]


def generation_facts(directory: Path) -> dict[str, Any]:
    """{"eos": ids, "generation": generation_config.json's content}; both empty where the files are silent.

    Of a model with an encoder also "decoder_start": the ids that its decoder begins with, and "forced_end": the one
    that a text ends with which a limit cuts, or None. Of one whose prompts see all of themselves "prefix": the id that
    `end`s what does, and the `marks` one of which stands before it.

    Raises ConfigError for an end that is no token id of the model, or a sampling default that no request could have.
    """
    path, other = directory / "generation_config.json", directory / "config.json"
    generation, config = read_json(path), read_json(other)
    vocab = config.get("vocab_size")
    limit = vocab if _integer(vocab, 1) else None
    files = ((path, generation), (other, config))
    stated = {file: _ids(file, facts, limit) for file, facts in reversed(files)}
    for key, allowed in _DEFAULTS.items():
        _check(path, generation, key, allowed)
    found = {"eos": stated[path if "eos_token_id" in generation else other], "generation": generation}
    if config.get("position_encoding_2d"):
        return {**found, "prefix": _prefix_facts(other, config, limit)}
    return {**found, **_decoder_facts(files, limit)} if config.get("is_encoder_decoder") else found


def _prefix_facts(path: Path, config: Mapping[str, Any], vocab: int | None) -> dict[str, Any]:
    """Of GLM, whose answers begin with the first token of a text, in the place of a mark."""
    keys = ("bos_token_id", "gmask_token_id", "mask_token_id")
    ids = [_ids(path, config, vocab, key) for key in keys]
    if missing := [key for key, each in zip(keys, ids, strict=True) if len(each) != 1]:
        raise ConfigError(f"{path} gives no single id as {', '.join(missing)}, which say where prompts end; add it")
    (end,), *marks = ids
    return {"end": end, "marks": [mark for (mark,) in marks]}


def _decoder_facts(files: Sequence[tuple[Path, Mapping[str, Any]]], vocab: int | None) -> dict[str, Any]:
    """Of several ids to end with the first is the one that is forced."""

    def ids(key: str) -> list[int]:
        return next((_ids(file, facts, vocab, key) for file, facts in files if facts.get(key) is not None), [])

    start = ids("decoder_start_token_id")[:1] or ids("bos_token_id")[:1]
    if not start:
        raise ConfigError(
            f"{files[-1][0]} says neither decoder_start_token_id nor bos_token_id, and the model's decoder begins with "
            f"one; add it"
        )
    end = ids("forced_eos_token_id")
    return {"decoder_start": [*start, *ids("forced_bos_token_id")[:1]], "forced_end": end[0] if end else None}


def _ids(path: Path, facts: Mapping[str, Any], vocab: int | None, key: str = "eos_token_id") -> list[int]:
    """The ids of a file's `key`; `vocab`: the size of the model's vocabulary, where it is known."""
    value = facts.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if not _integer(token, 0) or (vocab is not None and token >= vocab):
            most = "0 or more" if vocab is None else f"from 0 to {vocab - 1}"
            raise ConfigError(
                f"{path}: {key} = {value!r} holds {token!r}, which is no token id {most}; "
                "give an id, a list of ids, or null"
            )
    return ids


def _check(path: Path, facts: Mapping[str, Any], key: str, allowed: Allowed) -> None:
    """A key that is missing or null says nothing."""
    fits, expected = allowed
    value = facts.get(key)
    if value is not None and not fits(value):
        raise ConfigError(f"{path}: {key} = {value!r} is not {expected}; correct it, or remove the key")


def _integer(value: object, low: int, high: int = sys.maxsize) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _real(value: object, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= high


# What a request may ask for, since these stand in for what it leaves open.
_DEFAULTS: Mapping[str, Allowed] = {
    "do_sample": (lambda v: isinstance(v, bool), "true or false"),
    "max_new_tokens": (lambda v: _integer(v, 1), "an integer of at least 1"),
    "temperature": (lambda v: _real(v, 1e6) and not 0 < v < 1e-5, "0, or a number from 1e-05 to 1000000"),
    "top_k": (lambda v: _integer(v, -1, 2**31 - 1), "an integer from 0 to 2147483647, or -1"),
    "top_p": (lambda v: _real(v, 1.0) and v >= 1e-6, "a number from 1e-06 to 1"),
}
