"""SentencePiece's `.model` files, read as the protobuf messages that they are, and made into a tokenizer.

Fields are those of sentencepiece_model.proto; what would change a text and is not implemented is refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from penstock.errors import TokenizerError
from penstock.text.border import check_lengths
from penstock.text.merges import all_merges

SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2
MAX_PIECES = 1 << 19  # twice the most that were published
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class Kind(IntEnum):
    """What a piece is; an UNUSED one is in the file alone."""

    NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePiece:
    """The pieces in the order of their ids, and how a text is prepared for them."""

    pieces: tuple[Piece, ...]
    unigram: bool
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    squeeze: bool  # runs of spaces become one, and none is left at the ends
    legacy: bool = True  # each part between special tokens gets the dummy prefix, not only a text's beginning
    replaced: tuple[tuple[str, str], ...] = ()  # texts that stand for others, before everything else
    _ids: dict[str, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._ids.update((piece.text, index) for index, piece in enumerate(self.pieces))

    @property
    def vocabulary(self) -> Mapping[str, int]:
        return self._ids

    @property
    def special(self) -> tuple[str, ...]:
        return tuple(piece.text for piece in self.pieces if piece.kind in (Kind.CONTROL, Kind.UNKNOWN))

    def build(self, extra: Mapping[str, int]) -> tokenizers.Tokenizer:
        """The tokenizer, with the added tokens `extra` at their ids. Raises TokenizerError for ids it cannot have."""
        backend = tokenizers.Tokenizer(self._unigram(extra) if self.unigram else self._bpe(extra))
        backend.normalizer = normalizers.Sequence(list(self._normalizers()))
        if self.dummy_prefix and not self.legacy:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
        strip = [decoders.Strip(" ", 1, 0)] if self.dummy_prefix else []
        back = [decoders.Replace(new, old) for old, new in self.replaced]
        backend.decoder = decoders.Sequence(
            [*back, decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        if not self.unigram:
            backend.add_tokens(list(self._user_symbols()))
        return backend

    def _bpe(self, extra: Mapping[str, int]) -> models.BPE:
        normal = {piece.text for piece in self.pieces if piece.kind in (Kind.NORMAL, Kind.USER)}
        merges = all_merges([p.text for p in self.pieces if p.text in normal], lambda text: -self._score(text))
        return models.BPE(
            {**self._ids, **extra}, merges, unk_token=self._unknown, fuse_unk=True, byte_fallback=self.byte_fallback
        )

    def _score(self, text: str) -> float:
        return self.pieces[self._ids[text]].score

    def _unigram(self, extra: Mapping[str, int]) -> models.Unigram:
        top = max((p.score for p in self.pieces if p.kind is Kind.NORMAL), default=0.0)
        scored = [(p.text, len(p.text) * top - 0.1 if p.kind is Kind.USER else p.score) for p in self.pieces]
        for text, token_id in sorted(extra.items(), key=lambda pair: pair[1]):
            if token_id != len(scored):
                raise TokenizerError(
                    f"the added token {text!r} has id {token_id}, but {len(scored)} is the next after the pieces; "
                    "ids must follow each other"
                )
            scored.append((text, 0.0))
        return models.Unigram(scored, unk_id=self._ids[self._unknown], byte_fallback=self.byte_fallback)

    @property
    def _unknown(self) -> str:
        return next(piece.text for piece in self.pieces if piece.kind is Kind.UNKNOWN)

    def _normalizers(self) -> Iterator[Any]:
        yield from (normalizers.Replace(old, new) for old, new in self.replaced)
        if self.charsmap:
            yield normalizers.Precompiled(self.charsmap)
        if self.squeeze:
            yield normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), "")
            yield normalizers.Replace(Regex(" {2,}"), " ")
        if self.dummy_prefix and self.legacy:
            yield normalizers.Prepend(SPACE)
        yield normalizers.Replace(" ", SPACE)

    def _user_symbols(self) -> Iterator[AddedToken]:
        """Found before any merge. Those that hold a space are found in the normalised text, where it is written so."""
        for piece in self.pieces:
            if piece.kind is Kind.USER:
                spaced = SPACE in piece.text
                if spaced and self.dummy_prefix and self.legacy:
                    raise TokenizerError(
                        f"the user-defined piece {piece.text!r} holds a space in a SentencePiece model with a dummy "
                        "prefix, which is not implemented; use a directory with tokenizer.json"
                    )
                yield AddedToken(piece.text, normalized=spaced, special=False)


def parse(data: bytes, what: str) -> SentencePiece:
    """A model from its bytes; `what` names it in errors. Raises TokenizerError if damaged or not implemented."""
    try:
        pieces: list[Piece] = []
        fields = list(_without_pieces(data, pieces))
        trainer, normalizer, denormalizer = (_merged(fields, number) for number in (2, 3, 5))
    except (ValueError, struct.error) as error:
        raise TokenizerError(f"{what} is no SentencePiece model: {error}; download it again") from None
    check_lengths((piece.text for piece in pieces), what)
    if refused := [text for text, wrong in _refusals(pieces, trainer, normalizer, denormalizer) if wrong]:
        raise TokenizerError(f"{what}: {refused[0]}; use a directory with tokenizer.json")
    return SentencePiece(
        pieces=tuple(pieces),
        unigram=trainer.get(3, _UNIGRAM) == _UNIGRAM,
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=normalizer.get(2, b""),
        dummy_prefix=bool(normalizer.get(3, 1)),
        squeeze=bool(normalizer.get(4, 1)),
    )


def _refusals(
    pieces: list[Piece], trainer: dict[int, Any], normalizer: dict[int, Any], denormalizer: dict[int, Any]
) -> Iterator[tuple[str, bool]]:
    texts = [piece.text for piece in pieces]
    doubled = next((a for a, b in pairwise(sorted(texts)) if a == b), None)
    unknown = sum(piece.kind is Kind.UNKNOWN for piece in pieces)
    unused = next((piece.text for piece in pieces if piece.kind is Kind.UNUSED), None)
    present = {piece.text for piece in pieces if piece.kind is Kind.BYTE}
    yield f"the piece {doubled!r} is there twice", doubled is not None
    yield f"{unknown} pieces are the unknown one, there must be 1", unknown != 1
    yield f"the piece {unused!r} is marked unused, which is not implemented", unused is not None
    infinite = next((piece for piece in pieces if not math.isfinite(piece.score)), None)
    yield f"the score of the piece {infinite and infinite.text!r} is no finite number", infinite is not None
    yield f"model type {trainer.get(3)} is neither unigram (1) nor BPE (2)", trainer.get(3, 1) not in (1, 2)
    lacking = next((byte for byte in _BYTES if byte not in present), None)
    yield f"byte fallback without the piece {lacking!r}", bool(trainer.get(35, 0)) and lacking is not None
    yield "spaces at the end of a word (treat_whitespace_as_suffix) are not implemented", bool(trainer.get(24, 0))
    yield "spaces that are not escaped are not implemented", not normalizer.get(5, 1)
    yield "its map of characters is damaged", not _is_charsmap(normalizer.get(2, b""))
    yield "a denormalizer is not implemented", bool(denormalizer.get(2))


def _is_charsmap(value: object) -> bool:
    """Nothing; or its tree's size in bytes, the tree of 4-byte nodes, and texts."""
    if not isinstance(value, bytes) or not value:
        return value == b""
    size = int.from_bytes(value[:4], "little")
    return size % 4 == 0 and 0 < size <= len(value) - 4


def _without_pieces(data: bytes, pieces: list[Piece]) -> Iterator[tuple[int, Any]]:
    """The fields but those that are pieces, which go where they are wanted: a bad one, or one too many, ends it."""
    for number, value in _fields(data):
        if number != 1:
            yield number, value
        elif len(pieces) == MAX_PIECES:
            raise ValueError(f"more than {MAX_PIECES} pieces")
        else:
            pieces.append(_piece(value))


def _piece(data: object) -> Piece:
    message = _message(data)
    text, score = message.get(1, b""), message.get(2, 0.0)
    if not isinstance(text, bytes) or not text:
        raise ValueError("a piece without text")
    return Piece(text.decode("utf-8"), _float(score), Kind(message.get(3, 1)))


def _float(value: object) -> float:
    return struct.unpack("<f", value)[0] if isinstance(value, bytes) else 0.0


def _merged(fields: list[tuple[int, object]], wanted: int) -> dict[int, Any]:
    """A message that comes in several parts is one; the last value of a field counts."""
    merged: dict[int, Any] = {}
    for number, value in fields:
        if number == wanted:
            merged |= _message(value)
    return merged


def _message(data: object) -> dict[int, Any]:
    if not isinstance(data, bytes):
        raise ValueError("a number where a message must be")
    return dict(_fields(data))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value): an integer, or bytes for a message, a text or a fixed-size number."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        size, at = (8, at) if wire == 1 else (4, at) if wire == 5 else _varint(data, at)
        if size > len(data) - at:
            raise ValueError(f"{size} bytes are announced at byte {at}, {len(data) - at} are left")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise ValueError("it ends within a number")
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than 64 bits before byte {at}")
