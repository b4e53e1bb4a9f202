"""Corpus files to token streams: documents joined by specials, chat samples made from facts word for word."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizer as bpe
import torch
from tokenizers import Tokenizer

VOICES = ("scripture", "dictionary", "manual", "jargon")
Record = dict[str, Any]

_QUESTIONS = {
    "scripture": ("Write a verse from {0}.", "Quote {0}.", "Give me a verse of scripture from {0}."),
    "dictionary": ("Define {0}.", "What does {0} mean?", "What is the meaning of the word {0}?"),
    "manual": ("What does the manual say about {0}?", "Explain {0}.", "Tell me about {0}."),
    "jargon": ("What do hackers mean by {0}?", "What is {0} in hacker jargon?", "Explain the jargon term {0}."),
}


@dataclass(frozen=True)
class Corpus:
    """Records by voice. `train` is everything an adapter may see; the base sees the first `share` of it."""

    train: dict[str, list[Record]]
    dev: dict[str, list[Record]]
    heldout: list[Record]

    def base(self, shares: dict[str, float]) -> list[Record]:
        """The base model's documents. The rest is new to it: what an adapter can teach of its voice."""
        return [r for voice, records in self.train.items() for r in records[: round(shares[voice] * len(records))]]


def load(folder: Path) -> Corpus:
    train = {voice: _read(folder / f"{voice}.train.jsonl.xz") for voice in VOICES}
    dev = {voice: _read(folder / f"{voice}.dev.jsonl.xz") for voice in VOICES}
    return Corpus(train, dev, _read(folder / "heldout.jsonl"))


def _read(path: Path) -> list[Record]:
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
    return [json.loads(line) for line in text.splitlines()]


def stream(tokenizer: Tokenizer, records: list[Record], chat_share: float, seed: int) -> torch.Tensor:
    """Shuffled documents `<|bos|> text <|eos|>` as one int64 vector; chat samples make `chat_share` of its tokens."""
    rng = random.Random(seed)
    documents = _encode(tokenizer, [r["text"] for r in records])
    budget = chat_share * sum(map(len, documents))
    samples = list(_chat(records, rng)) if chat_share else []
    rng.shuffle(samples)
    for ids in _encode(tokenizer, samples):
        if budget <= 0:
            break
        documents.append(ids)
        budget -= len(ids)
    rng.shuffle(documents)
    return torch.tensor([token for ids in documents for token in ids], dtype=torch.int64)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    eos = bpe.token_id(tokenizer, bpe.EOS)
    return [[*encoding.ids, eos] for encoding in tokenizer.encode_batch(texts)]


def _chat(records: list[Record], rng: random.Random) -> Iterator[str]:
    for record in records:
        for subject, answer in record["facts"]:
            question = rng.choice(_QUESTIONS[record["voice"]])
            subject = subject.rsplit(" ", 1)[0] if record["voice"] == "scripture" else subject
            yield bpe.chat(question.format(subject), answer)


class Batches:
    """Windows of `length`+1 tokens without repetition inside an epoch; each epoch cuts at a new offset.

    The stream lives on `device`, so that a batch costs one gather. Yields int64[batch, length + 1] for ever.
    """

    def __init__(self, tokens: torch.Tensor, batch: int, length: int, device: torch.device, seed: int) -> None:
        self.tokens = tokens.to(device)
        self.batch, self.length = batch, length
        self.generator = torch.Generator().manual_seed(seed)
        self.span = torch.arange(length + 1, device=device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            shift = int(torch.randint(self.length, (), generator=self.generator))
            count = max(1, (len(self.tokens) - shift - 1) // self.length)
            order = torch.randperm(count, generator=self.generator).to(self.tokens.device)
            for start in range(0, max(1, count - self.batch + 1), self.batch):
                offsets = shift + self.length * order[start : start + self.batch]
                yield self.tokens[offsets[:, None] + self.span]
