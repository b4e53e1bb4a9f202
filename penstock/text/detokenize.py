"""Token ids to text as they come, whole characters only; and stop strings across token borders."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Protocol

from penstock.errors import SamplingError
from penstock.text.alphabet import byte_of_character
from penstock.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# A character has at most 4 bytes; a model that emits this many broken ones in a row is not about to mend them.
_MAX_HELD = 32
_CONTEXT = 8


class IncrementalDetokenizer:
    """The text of a growing token sequence, each character as soon as it is certain.

    The pieces joined equal `tokenizer.decode(all ids)`, and no piece ends in part of a character. With `prompt_ids`
    the text continues the prompt's: a SentencePiece word then keeps its leading space, which `decode` drops only at
    the start of a text. One exception, of SentencePiece byte tokens only: `decode` replaces a whole run of them when
    any part is broken; here characters that were whole when they came stay.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True,
        shown: Collection[int] = (),
    ) -> None:  # fmt: skip
        """`shown`: special tokens that are not left out, since they mean something to whoever reads the text."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids.difference(shown) if skip_special_tokens else frozenset()
        self._decoder: _Decoder = _ByteLevel(tokenizer) if is_byte_level(tokenizer) else _Window(tokenizer)
        self._decoder.prime(self._tail(prompt_ids))

    def add(self, token_id: int) -> str:
        """The text that became certain with this token, often empty."""
        return self._decoder.add(token_id) if self._has_text(token_id) else ""

    def finish(self) -> str:
        """What is still held back, broken characters as U+FFFD. Nothing may be added afterwards."""
        return self._decoder.finish()

    def _has_text(self, token_id: int) -> bool:
        return token_id not in self._skipped and self._tokenizer.id_to_token(token_id) is not None

    def _tail(self, prompt_ids: Sequence[int]) -> list[int]:
        tail: list[int] = []
        for token_id in reversed(prompt_ids):
            if len(tail) == _CONTEXT:
                break
            if self._has_text(token_id):
                tail.insert(0, token_id)
        return tail


class _Decoder(Protocol):
    """How tokens become text; `prime` sees the tokens before the first, and emits nothing."""

    def prime(self, ids: Sequence[int]) -> None: ...

    def add(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteLevel:
    """Byte-level BPE: a token is bytes, the text is their UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def prime(self, ids: Sequence[int]) -> None:
        for token_id in ids:
            self.add(token_id)

    def add(self, token_id: int) -> str:
        token = self._tokenizer.id_to_token(token_id)
        assert token is not None
        return self._utf8.decode(token_bytes(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Window:
    """Any decoder: decode the last few tokens again, with and without the new one, and emit the difference.

    Invariant: `_shown` is the text of `_window` up to what was emitted, so context that a decoder needs (a leading
    space is dropped only from the first token) is always there.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._fresh = 0  # index of the first token whose text is not emitted
        self._shown = ""

    def prime(self, ids: Sequence[int]) -> None:
        for count in range(1, len(ids) + 1):
            self._window = list(ids[-count:])
            self._shown = self._text()
            if self._shown and not self._shown.endswith(_REPLACEMENT):
                break
        self._fresh = len(self._window)

    def add(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._text()
        held = len(self._window) - self._fresh
        if text.endswith(_REPLACEMENT) and held < _MAX_HELD:
            return ""
        new = text[len(self._shown) :]
        self._advance(text, bool(new))
        return new

    def finish(self) -> str:
        return self._text()[len(self._shown) :]

    def _advance(self, text: str, emitted: bool) -> None:
        if not emitted:
            return
        # Keep the tokens just emitted as context; the ones before them are no longer needed.
        kept = self._window[self._fresh :]
        kept_text = self._tokenizer.decode(kept, skip_special_tokens=False)
        if kept_text:
            self._window, text = kept, kept_text
        self._fresh, self._shown = len(self._window), text

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)


class StopStrings:
    """Cuts a stream of text at the first stop string, wherever the pieces' borders fall.

    First means: the one that is complete first; of several complete at the same character, the longest. So the
    result depends on the text alone, never on how it was cut into pieces. Text that may yet turn out to be the
    beginning of a stop string is held back, and no more than that.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: emit the stop string too. Raises SamplingError on an empty one."""
        if "" in stops:
            raise SamplingError("stop holds an empty string, which would end every text at once; leave it out")
        self._stops = tuple(dict.fromkeys(stops))
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def add(self, text: str) -> str:
        """The part that is certain to come before any stop string; "" once one has matched."""
        if self.matched is not None:
            return ""
        text = self._held + text
        if (match := self._first(text)) is not None:
            begin, self.matched = match
            self._held = ""
            return text[: begin + len(self.matched)] if self._include else text[:begin]
        keep = len(text) - self._longest_beginning(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, str] | None:
        found = ((text.find(stop), stop) for stop in self._stops)
        matches = [(begin + len(stop), begin, stop) for begin, stop in found if begin >= 0]
        return min(matches)[1:] if matches else None

    def _longest_beginning(self, text: str) -> int:
        return max((overlap(text, stop) for stop in self._stops), default=0)


def overlap(text: str, stop: str, begin: int = 0) -> int:
    """The length of the longest end of `text`, from `begin`, that is a beginning of `stop`, shorter than all of it."""
    longest = min(len(text) - begin, len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def bytes_writer(tokenizer: Tokenizer) -> Callable[[int], bytes] | None:
    """Of byte-level BPE: what a token of that id writes, wherever it stands."""
    return (lambda token_id: token_bytes(tokenizer.id_to_token(token_id) or "")) if is_byte_level(tokenizer) else None


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether its tokens are bytes, and its text their UTF-8."""
    decoder = tokenizer.backend.decoder
    return decoder is not None and json.loads(decoder.__getstate__()).get("type") == "ByteLevel"


@lru_cache(maxsize=1 << 18)  # a vocabulary: each token comes many times
def token_bytes(token: str) -> bytes:
    """A token with any character outside the table is an added one, and stands for its own text."""
    table = byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode("utf-8")
