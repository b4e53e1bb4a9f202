"""What each token of a model writes, in bytes: what a grammar is matched against."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from penstock.errors import SamplingError
from penstock.text.detokenize import bytes_writer
from penstock.text.tokenizer import Tokenizer

_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_TRIED: Final = 256  # tokens written together, to see that a text is its tokens' bytes one after another


@dataclass(frozen=True)
class Vocabulary:
    """tokens: by id, b"" for those that write nothing and those that no grammar may use. size: that of a row of logits,
    as large or larger. stops: ids that end a text."""

    tokens: tuple[bytes, ...]
    size: int
    stops: tuple[int, ...]

    def info(self) -> Any:
        """As xgrammar's TokenizerInfo. Raises SamplingError where there is no xgrammar."""
        library = xgrammar()
        kind = library.VocabType.RAW
        return library.TokenizerInfo([*self.tokens], kind, vocab_size=self.size, stop_token_ids=[*self.stops])


def xgrammar() -> Any:
    """The library; importing it takes a second, and torch. Raises SamplingError where it is not installed."""
    try:
        import xgrammar as library
    except ImportError as error:
        raise SamplingError(
            f"guided_decoding needs xgrammar, which is not here ({error}); install it with `pip install xgrammar`"
        ) from error
    return library


def vocabulary_of(tokenizer: Tokenizer | None, size: int, eos: Iterable[int]) -> Vocabulary:
    """`size`, `eos`: the model's; its tokenizer's ends are added. Raises SamplingError where no grammar can be held to:
    there is no tokenizer, no token that ends a text, or a text is not its tokens' bytes one after another."""
    if tokenizer is None:
        raise SamplingError("guided_decoding needs a tokenizer, and there is none; leave skip_tokenizer_init out")
    stops = tuple(sorted(each for each in {*eos, *tokenizer.eos_token_ids} if each < size))
    if not stops:
        raise SamplingError("guided_decoding needs a token that ends a text, and the model names none; leave it out")
    count = min(size, tokenizer.vocab_size)
    silent = tokenizer.special_ids | {*stops}
    ids = [each for each in range(count) if each not in silent and tokenizer.id_to_token(each) is not None]
    written = dict(zip(ids, _written(tokenizer, ids), strict=True))
    return Vocabulary(tuple(written.get(each, b"") for each in range(count)), size, stops)


def _written(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    if (write := bytes_writer(tokenizer)) is not None:
        return [write(each) for each in ids]
    fallback = '"ByteFallback"' in json.dumps(_state(tokenizer))
    anchor, before = _anchor(tokenizer, ids)
    texts = tokenizer.backend.decode_batch([[anchor, each] for each in ids], skip_special_tokens=False)
    if not all(text.startswith(before) for text in texts):
        raise _no_bytes()
    found = [text[len(before) :].encode() for text in texts]
    if fallback:
        bytes_ = (_BYTE.match(tokenizer.id_to_token(each) or "") for each in ids)
        found = [own if m is None else bytes([int(m[1], 16)]) for own, m in zip(found, bytes_, strict=True)]
    _prove(tokenizer, anchor, before, ids, found)
    return found


def _state(tokenizer: Tokenizer) -> Any:
    decoder = tokenizer.backend.decoder
    return None if decoder is None else json.loads(decoder.__getstate__())


def _anchor(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[int, str]:
    """A token and its text, behind which others write what they write within a text: not of bytes, which runs of them
    take along where they are broken."""
    for each in (each for each in ids if not _BYTE.match(tokenizer.id_to_token(each) or "")):
        text = tokenizer.decode([each], skip_special_tokens=False)
        if text.isascii() and text.isalnum():
            return each, text
    raise _no_bytes()


def _prove(tokenizer: Tokenizer, anchor: int, before: str, ids: Sequence[int], found: Sequence[bytes]) -> None:
    plain = [(each, text) for each, text in zip(ids, found, strict=True) if _is_text(text)]
    some = plain[:: max(1, len(plain) // _TRIED)]
    joined = tokenizer.decode([anchor, *(each for each, _ in some)], skip_special_tokens=False)
    if joined.encode() != before.encode() + b"".join(text for _, text in some):
        raise _no_bytes()


def _is_text(written: bytes) -> bool:
    """Whether it is whole characters, none of them broken already."""
    return b"\xef\xbf\xbd" not in written and "\ufffd" not in written.decode(errors="replace")


def _no_bytes() -> SamplingError:
    return SamplingError(
        "guided_decoding: this tokenizer's texts are not its tokens' one after another, so no grammar can be held to; "
        "leave it out"
    )
