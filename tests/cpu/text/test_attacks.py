"""Tokenizer files made to hang, crash or confuse: typed errors, and soon; the next good text is cut as ever."""

from __future__ import annotations

import base64
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import TokenizerError
from penstock.text import Tokenizer, sentencepiece
from penstock.text.alphabet import character_of_byte

ALPHABET = {character: number for number, character in enumerate(character_of_byte().values())}
BYTES = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
BPE, UNIGRAM = b"\x12\x02\x18\x02", b"\x12\x02\x18\x01"


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def piece(text: str, score: float = 0.0, kind: int = 1) -> bytes:
    return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))


def pieces(*more: bytes, tail: bytes = BPE) -> bytes:
    return b"".join(
        (piece("<unk>", kind=2), piece("<s>", kind=3), piece("a"), piece("b"), piece("ab", -1), *more, tail)
    )


def load(directory: Path, name: str, data: object, kind: str, **config: Any) -> Tokenizer:
    directory.mkdir(exist_ok=True)
    (directory / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **config}))
    return Tokenizer.from_dir(directory)


PIECES = [
    (pieces(piece("a" * 5000)), "a token of 5000 characters, at most 4096"),
    (pieces(piece("a" * 1_000_000), tail=UNIGRAM), "a token of 1000000 characters"),  # its tree would end the process
    (pieces(*(piece("a" * n) for n in range(3, 2000))), "too long to find their merges"),
    (pieces(piece("c", float("nan"))), "the score of the piece 'c' is no finite number"),
    (pieces(tail=UNIGRAM + field(3, field(2, b"\xff\xff\xff\xff" + bytes(8)))), "map of characters is damaged"),
    (pieces(tail=BPE + field(3, b"\x10\x05")), "map of characters is damaged"),
    (pieces() + b"\n\x00" * 1_000_000, "a piece without text"),
]


@pytest.mark.parametrize(("data", "said"), PIECES)
def test_pieces_that_are_damaged_are_refused_at_once(data: bytes, said: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(TokenizerError, match=said):
        load(tmp_path, "tokenizer.model", data, "LlamaTokenizer", bos_token="<s>")
    assert time.monotonic() - begin < 2


def test_pieces_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece, "MAX_PIECES", 5)
    assert len(sentencepiece.parse(pieces(), "a file").pieces) == 5
    with pytest.raises(TokenizerError, match="more than 5 pieces"):
        sentencepiece.parse(pieces(piece("c")), "a file")


RANKS = [
    (b"YQ== 300", "has rank 97 already"),
    (b"YWI= -5", "is not a token in base64 and its rank"),
    (b"YWI= 2_5_6", "is not a token in base64 and its rank"),
    (b"YWI= 9999999999", "is not a token in base64 and its rank"),
    (base64.b64encode(b"a" * 1_000_000) + b" 256", "too long to find their merges"),
]


@pytest.mark.parametrize(("line", "said"), RANKS)
def test_ranks_that_are_damaged(line: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=said):
        load(tmp_path, "qwen.tiktoken", b"\n".join((*BYTES, line)), "QWenTokenizer")


CONFIGS = [
    ({"added_tokens_decoder": [1]}, "added_tokens_decoder is a list, expected an object"),
    ({"additional_special_tokens": 5}, "additional_special_tokens is a int, expected a list"),
    ({"extra_special_tokens": {"a": {"content": "x"}, "b": [1]}}, "is no token"),
    ({"bos_token": "\ud800"}, "surrogates not allowed"),
]


@pytest.mark.parametrize(("config", "said"), CONFIGS)
def test_configs_of_the_wrong_types(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(TokenizerError, match=said):
        load(tmp_path, "vocab.json", {**ALPHABET, "<|endoftext|>": 256}, "GPT2Tokenizer", **config)


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", "added_tokens": [], **dict.fromkeys(parts), "model": model, **changes}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


LOADS = [
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "anVuaw=="}},
    {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"],
               "continuing_subword_prefix": "####"}},
    {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a" * 1_000_000, -1.0]]}},
]  # fmt: skip
CUTS = [
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    {"model": {"type": "Unigram", "unk_id": None, "vocab": [["z", 0.0]]}},
    {"model": {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"z": 0}}},
]


@pytest.mark.parametrize("changes", LOADS)
def test_what_the_library_panics_about_is_ours(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"download it again|is it damaged"):
        load(tmp_path, "tokenizer.json", tokenizer_json(**changes), "")


@pytest.mark.parametrize("changes", CUTS)
def test_what_it_panics_about_later_is_too(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"cannot cut this text.*send token ids"):
        load(tmp_path, "tokenizer.json", tokenizer_json(**changes), "").encode("ab")


def test_an_expression_that_would_not_end(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, "tokenizer.json", tokenizer_json(pre_tokenizer=split("(a+)+$")), "")
    with pytest.raises(TokenizerError, match="cannot cut this text"):
        tokenizer.encode("a" * 40 + "b")
    assert tokenizer.encode("ab") == [0, 1]
