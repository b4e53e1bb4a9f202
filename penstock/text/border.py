"""The border to the tokenizer library, which is Rust: it raises bare exceptions, and panics beyond `Exception`.

What it cannot even raise for is refused before: a tree of tokens is as deep as the longest, and is taken down by
recursion, so that a token of a million characters ends the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from penstock.errors import PenstockError, TokenizerError
from penstock.text.files import parse_json

MAX_TOKEN_CHARS = 4096  # of one token; the longest published, runs of blanks, have some hundred
_LIST = re.compile(r'"vocab"\s*:\s*\[')  # a Unigram's, whose tokens make a tree
_HIDDEN = re.compile(r"\\u00[2-7]")  # letters that somebody did not want to be found


@contextmanager
def border(failed: str, remedy: str) -> Iterator[None]:
    """Whatever the library raises inside becomes a TokenizerError: `failed`, its message, and `remedy`."""
    try:
        yield
    except PenstockError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{failed}: {error}; {remedy}") from error


def check_lengths(tokens: Iterable[object], what: str) -> None:
    """Raises TokenizerError for a token of unreasonable length."""
    if longest := next((t for t in tokens if isinstance(t, str) and len(t) > MAX_TOKEN_CHARS), None):
        raise TokenizerError(
            f"{what} holds a token of {len(longest)} characters, at most {MAX_TOKEN_CHARS} are read; is it damaged?"
        )


def check_tree(text: str, what: str) -> None:
    """The tokens of a tokenizer.json that may hold a Unigram model; others are not parsed twice. Raises
    TokenizerError for one that is too long."""
    if not _LIST.search(text) and not _HIDDEN.search(text):
        return
    try:
        value: Any = parse_json(text)
    except ValueError as error:
        raise TokenizerError(f"{what} is not JSON: {error}; download it again") from error
    model = value.get("model") if isinstance(value, dict) else None
    pairs = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(pairs, list):
        check_lengths((pair[0] for pair in pairs if isinstance(pair, list) and pair), what)
