"""Tiny tokenizers of both kinds, trained in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "In the beginning God created the heaven and the earth.",
    "a penstock is a pipe that brings water to the turbine, under pressure",
    "the quick brown fox jumps over the lazy dog; 0123456789 !?\n\n\tdef f(x):\n        return x + 1",
    "Ünïcödé ist schön, 水は流れる, вода течёт",
] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: tokens are bytes."""
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL)
    )
    tok.add_tokens([AddedToken("<tool é>", special=False)])
    return tok


def byte_fallback() -> tokenizers.Tokenizer:
    """Llama 2's kind: SentencePiece BPE, `▁` for a space, bytes for what the vocabulary lacks."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefghijklmnopqrstuvwxyzé水"]
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁")]
    pieces += [left + right for left, right in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tok = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok.add_special_tokens(SPECIAL)
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return tok


def unigram() -> tokenizers.Tokenizer:
    """T5's kind: Unigram with Metaspace; characters outside the corpus are unknown."""
    tok = tokenizers.Tokenizer(models.Unigram())
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    tok.train_from_iterator(CORPUS, trainer)
    return tok


MAKERS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "unigram": unigram}


def write(directory: Path, tok: tokenizers.Tokenizer, **files: object) -> Path:
    """A model directory's text side; `files` are JSON by stem."""
    directory.mkdir(exist_ok=True)
    tok.save(str(directory / "tokenizer.json"))
    for stem, value in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(value), "utf-8")
    return directory


@pytest.fixture(scope="session")
def backends() -> dict[str, tokenizers.Tokenizer]:
    return {name: make() for name, make in MAKERS.items()}
