"""What compiles grammars, for the bundled model's vocabulary; and walks through them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from penstock import bundled
from penstock.grammar import GuidedDecoding
from penstock.grammar.guide import Grammars, Guide
from penstock.grammar.process import Compiler
from penstock.grammar.vocabulary import Vocabulary, vocabulary_of
from penstock.text import Tokenizer


class Walker:
    """Draws texts that a grammar allows, tokens evenly, ends and what closes JSON more often."""

    def __init__(self, vocabulary: Vocabulary, compiler: Compiler) -> None:
        self.vocabulary, self.compiler = vocabulary, compiler
        self.grammars = Grammars(lambda: vocabulary)
        self.closing = {i for i, text in enumerate(vocabulary.tokens) if text in (b'"', b"}", b"]", b",")}

    def guide(self, guided: GuidedDecoding) -> Guide:
        return self.grammars.guide(self.compiler.compile(guided))

    def allowed(self, guide: Guide, tokens: list[int]) -> list[int]:
        mask = np.zeros((1, -(-self.vocabulary.size // 32)), np.int32)
        guide.fill([*tokens], (), mask, 0)
        if (mask == -1).all():
            return []  # the text is over
        found: list[int] = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        assert found, f"nothing is allowed behind {tokens}"
        return found

    def walk(self, guided: GuidedDecoding, seed: int, most: int = 120) -> list[int] | None:
        """The tokens of one text; None where it did not end in time."""
        draw, guide, tokens = random.Random(seed), self.guide(guided), list[int]()
        for _ in range(most):
            allowed = self.allowed(guide, tokens)
            if (ends := [t for t in allowed if t in self.vocabulary.stops]) and draw.random() < 0.5:
                assert self.allowed(guide, [*tokens, ends[0]]) == []
                return tokens
            closing = [t for t in allowed if t in self.closing]
            tokens.append(draw.choice(closing if closing and draw.random() < 0.3 else allowed))
            if tokens[-1] in self.vocabulary.stops:
                return tokens[:-1]
        return None


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(bundled.target())


@pytest.fixture(scope="session")
def walker(tokenizer: Tokenizer) -> Iterator[Walker]:
    vocabulary = vocabulary_of(tokenizer, tokenizer.vocab_size + 7, ())
    compiler = Compiler(lambda: vocabulary)
    yield Walker(vocabulary, compiler)
    compiler.close()
