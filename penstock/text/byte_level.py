"""Byte-level BPE from the files before tokenizer.json: vocab.json with merges.txt, and tiktoken's ranks."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from penstock.errors import TokenizerError
from penstock.text.alphabet import character_of_byte
from penstock.text.files import MAX_ID
from penstock.text.merges import all_merges

# How a text is cut before it is merged; each is the published expression of its tokenizers.
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"  # Llama 3, GLM-4
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
)
QWEN = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH}?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # gpt-oss


@dataclass(frozen=True)
class ByteLevel:
    """Tokens written in GPT-2's alphabet of bytes, and the merges between them.

    pattern: how a text is cut; None is GPT-2's own expression. whole: a piece that is a token is taken at once.
    """

    vocabulary: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    pattern: str | None = None
    whole: bool = False
    prefix_space: bool = False
    compose: bool = False  # Unicode's NFC comes first
    special: tuple[str, ...] = ()

    def build(self, extra: Mapping[str, int]) -> tokenizers.Tokenizer:
        model = models.BPE({**self.vocabulary, **extra}, list(self.merges), fuse_unk=False, ignore_merges=self.whole)
        backend = tokenizers.Tokenizer(model)
        if self.compose:
            backend.normalizer = normalizers.NFC()
        by_pattern = self.pattern is not None
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=self.prefix_space, use_regex=not by_pattern)
        cut = [pre_tokenizers.Split(Regex(self.pattern), "isolated")] if self.pattern is not None else []
        backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, to_bytes])
        backend.decoder = decoders.ByteLevel()
        return backend


def parse_merges(text: str, vocabulary: Mapping[str, int], what: str) -> tuple[tuple[str, str], ...]:
    """merges.txt: a version line, then two tokens a line, the first merge first. Raises TokenizerError."""
    lines = text.split("\n")
    numbered = [
        (n, line) for n, line in enumerate(lines, 1) if line.strip() and not (n == 1 and line[:8] == "#version")
    ]
    merges: list[tuple[str, str]] = []
    for number, line in numbered:
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or not all(part in vocabulary for part in (*parts, "".join(parts))):
            raise TokenizerError(
                f"{what}, line {number}: {line[:60]!r} are not two tokens whose joint text is one too; "
                "vocab.json and merges.txt are of two tokenizers"
            )
        merges.append((parts[0], parts[1]))
    return tuple(merges)


def parse_vocabulary(value: Mapping[str, object], what: str) -> dict[str, int]:
    """vocab.json: tokens and their ids, each once. Raises TokenizerError."""
    checked = {token: number for token, number in value.items() if type(number) is int and 0 <= number <= MAX_ID}
    if not checked or len(checked) != len(value) or len(set(checked.values())) != len(checked):
        raise TokenizerError(f"{what} must map each token to an id of its own, 0 to {MAX_ID}; download it again")
    return checked


def parse_tiktoken(data: bytes, what: str) -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """tiktoken's file: a token's bytes in base64 and its rank, which is its id too, a line. Raises TokenizerError."""
    alphabet = character_of_byte()
    ranks: dict[str, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if line:
            token, rank = _tiktoken_line(line, number, what)
            text = "".join(alphabet[byte] for byte in token)
            if ranks.setdefault(text, rank) != rank:
                raise TokenizerError(
                    f"{what}, line {number}: {line[:60]!r}, but that token has rank {ranks[text]} already; "
                    "download it again"
                )
    ordered = sorted(ranks, key=ranks.__getitem__)
    if (missing := next((b for b, character in alphabet.items() if character not in ranks), None)) is not None:
        raise TokenizerError(f"{what} lacks the token of byte {missing}; download it again")
    if twice := next((b for a, b in pairwise(ordered) if ranks[a] == ranks[b]), None):
        raise TokenizerError(f"{what} gives rank {ranks[twice]} to two tokens; download it again")
    return ranks, tuple(all_merges(ordered, ranks.__getitem__))


def _tiktoken_line(line: bytes, number: int, what: str) -> tuple[bytes, int]:
    try:
        token, rank = line.split()
        if not rank.isdigit() or int(rank) > MAX_ID:
            raise ValueError
        return base64.b64decode(token, validate=True), int(rank)
    except (ValueError, binascii.Error):
        raise TokenizerError(
            f"{what}, line {number}: {line[:60]!r} is not a token in base64 and its rank; download the file again"
        ) from None
