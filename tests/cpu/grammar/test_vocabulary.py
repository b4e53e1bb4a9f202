"""What tokens write: the bytes joined are the text, for byte-level and for SentencePiece vocabularies."""

from __future__ import annotations

import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from penstock.errors import SamplingError
from penstock.grammar import GuidedDecoding
from penstock.grammar.process import Compiler
from penstock.grammar.vocabulary import Vocabulary, vocabulary_of
from penstock.text import Tokenizer
from tests.cpu.grammar.conftest import Walker

SPACE = "\u2581"


def byte_fallback(strip: bool = True) -> Tokenizer:
    """Bytes, letters, words with the space before them, and a few characters of more bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"abcdefghij", SPACE]
    pieces += [f"{SPACE}ab", f"{SPACE}cde", "fgh", "é", "漢", f"{SPACE}{SPACE}", "\u2581é", "0", "1", "2", "[TOOL]"]
    backend = tokenizers.Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] * strip)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens(["[TOOL]"])
    return Tokenizer(backend, eos_token_ids=[2])


def metaspace() -> Tokenizer:
    pieces = ["<s>", "</s>", *"abc", SPACE, f"{SPACE}ab", "漢"]
    backend = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, eos_token_ids=[1])


def entangled() -> Tokenizer:
    """What a token writes depends on the next."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "</s>": 3}, []))
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("bc", "X")])
    return Tokenizer(backend, eos_token_ids=[3])


@pytest.mark.parametrize("kind", ["bundled", "fallback", "unstripped", "metaspace"])
def test_the_bytes_joined_are_the_text(kind: str, tokenizer: Tokenizer) -> None:
    of = {
        "bundled": tokenizer,
        "fallback": byte_fallback(),
        "unstripped": byte_fallback(False),
        "metaspace": metaspace(),
    }
    own = of[kind]
    vocabulary = vocabulary_of(own, own.vocab_size + 3, ())
    written = [i for i, text in enumerate(vocabulary.tokens) if text]
    assert not own.special_ids & {*written} and len(written) >= own.vocab_size - 8
    first = next(i for i in written if vocabulary.tokens[i].isalpha())
    draw = random.Random(1)
    for _ in range(200):
        some = [first, *draw.choices(written, k=12)]
        joined = b"".join(vocabulary.tokens[i] for i in some)
        try:
            text = joined.decode()
        except UnicodeDecodeError:
            continue  # a decoder may write one U+FFFD for several broken bytes
        assert own.decode(some, skip_special_tokens=False) == text


def test_bytes_and_spaces_of_a_fallback_vocabulary() -> None:
    own = byte_fallback()
    tokens = vocabulary_of(own, 400, (2,)).tokens
    assert tokens[3 + 0xE6] == b"\xe6" and tokens[3 + 0x41] == b"A"
    assert tokens[own.token_to_id(f"{SPACE}ab") or 0] == b" ab"
    assert tokens[own.token_to_id("[TOOL]") or 0] == b"[TOOL]" and tokens[:3] == (b"", b"", b"")


def test_a_fallback_vocabulary_masks_right() -> None:
    """Also through bytes that are part of a character only."""
    own = byte_fallback()
    vocabulary = vocabulary_of(own, 400, ())
    compiler = Compiler(lambda: vocabulary)
    try:
        walker, found = Walker(vocabulary, compiler), set()
        for seed in range(80):
            tokens = walker.walk(GuidedDecoding(choice=["ab 漢é", " abc", "fgh0"]), seed)
            assert tokens is not None
            found.add(b"".join(vocabulary.tokens[i] for i in tokens).decode())
            assert own.decode([own.token_to_id("a") or 0, *tokens])[1:] in ("ab 漢é", " abc", "fgh0")
        assert found == {"ab 漢é", " abc", "fgh0"}
    finally:
        compiler.close()


def test_what_no_grammar_can_be_held_to() -> None:
    own = byte_fallback()
    own.eos_token_ids = ()
    for wrong, why in ((None, "needs a tokenizer"), (own, "names none"), (entangled(), "one after another")):
        with pytest.raises(SamplingError, match=why):
            vocabulary_of(wrong, 400, ())


def test_ends_are_the_models_and_the_tokenizers(tokenizer: Tokenizer) -> None:
    vocabulary = vocabulary_of(tokenizer, 5000, (7, 9999))
    assert vocabulary.stops == tuple(sorted({7, *tokenizer.eos_token_ids}))
    assert isinstance(vocabulary, Vocabulary) and vocabulary.tokens[7] == b""
