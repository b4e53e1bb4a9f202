"""Tokenizers from before tokenizer.json give the ids of the libraries that they were made for.

encodings.json holds small models trained by sentencepiece 0.2.3 and tiktoken 0.14.0, and the ids that these libraries
give for texts; nothing of ours had a part in it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from penstock.errors import TokenizerError
from penstock.text import Tokenizer, sentencepiece
from penstock.text.detokenize import IncrementalDetokenizer
from penstock.text.legacy import copy_text
from tests.cpu.text.conftest import byte_level

Piece = tuple[str, float, int]
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
BYTES: list[Piece] = [(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
SP = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@cache
def facts() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "encodings.json").read_text())


def published(kind: str) -> bytes:
    return base64.b64decode(facts()["sentencepiece"][kind]["model"])


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def model(
    pieces: list[Piece],
    trainer: dict[int, Any] | None = None,
    normalizer: dict[int, Any] | None = None,
    more: bytes = b"",
) -> bytes:
    out = b"".join(
        field(1, field(1, text.encode()) + field(2, float(score)) + field(3, kind)) for text, score, kind in pieces
    )
    for number, message in ((2, trainer), (3, normalizer)):
        out += field(number, b"".join(field(n, v) for n, v in (message or {}).items()))
    return out + more


START: list[Piece] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
LETTERS: list[Piece] = [(c, -10.0 - i, NORMAL) for i, c in enumerate("▁abc")]
BPE = {3: 2}


def written(directory: Path, files: dict[str, bytes | str], **configs: Any) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for stem, value in configs.items():
        (directory / f"{stem}.json").write_text(json.dumps(value))
    return directory


@pytest.mark.parametrize("kind", ["bpe-bytes", "bpe-bytes-no-prefix", "bpe", "unigram", "unigram-bytes"])
def test_sentencepiece_gives_the_ids_of_its_library(kind: str) -> None:
    backend = sentencepiece.parse(published(kind), kind).build({})
    tok = Tokenizer(backend)
    encodings = facts()["sentencepiece"][kind]["encodings"]
    assert len(encodings) == 41
    for text, ids in encodings:
        # In a unigram model control pieces are pieces like others until they are added tokens, as they are in use.
        assert tok.encode(text) == ids or ("</s>" in text and kind[:3] == "uni"), text
    for text, ids in encodings if kind.startswith("bpe-bytes") else []:
        # A text's own ▁ is a space afterwards; that is SentencePiece's doing.
        assert tok.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


@pytest.mark.parametrize(
    ("kind", "file", "config"),
    [
        ("cl100k_base", "cl100k_base.tiktoken", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ("o200k_base", "o200k_base.tiktoken", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ("qwen", "qwen.tiktoken", {"tokenizer_class": "QWenTokenizer"}),
        ("llama3", "tokenizer.model", {"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": {
            "330": {"content": "[gMASK]", "special": True}, "331": {"content": "<sop>", "special": True}}}),
    ],
)  # fmt: skip
def test_tiktoken_gives_the_ids_of_its_library(kind: str, file: str, config: dict[str, Any], tmp_path: Path) -> None:
    fact = facts()["tiktoken"][kind]
    tok = Tokenizer.from_dir(written(tmp_path, {file: fact["ranks"]}, tokenizer_config=config))
    assert len(fact["encodings"]) == 43
    for text, ids in fact["encodings"]:
        assert tok.encode(text, add_special_tokens=False) == ids, text
        assert tok.decode(ids) == text
        assert pieces(tok, ids) == text
    if kind == "qwen":
        chat = tok.encode("<|im_start|>a<|im_end|><|endoftext|><|extra_204|>")
        assert [chat[0], *chat[2:]] == [331, 332, 330, 333 + 204]
        assert tok.special_ids == frozenset(range(330, 538))
    if kind == "llama3":
        assert tok.encode("a")[:2] == [330, 331]


def pieces(tok: Tokenizer, ids: list[int]) -> str:
    stream = IncrementalDetokenizer(tok)
    return "".join(map(stream.add, ids)) + stream.finish()


def by_class(directory: Path, **config: Any) -> Tokenizer:
    files = {"tokenizer.model": model(START + BYTES + LETTERS, {**BPE, 35: 1}, {4: 0})}
    return Tokenizer.from_dir(written(directory, files, tokenizer_config=config))


def test_a_llama_begins_with_its_token(tmp_path: Path) -> None:
    tok = by_class(tmp_path / "a", tokenizer_class="LlamaTokenizer", **SP)
    space, a = 259, 260
    assert tok.encode("a") == [1, space, a]
    assert tok.encode("a", add_special_tokens=False) == [space, a]
    assert tok.encode("a</s>a") == [1, space, a, 2, space, a]
    assert (tok.bos_token_id, tok.eos_token_ids, tok.special_ids) == (1, (2,), {0, 1, 2})
    newer = by_class(tmp_path / "b", tokenizer_class="LlamaTokenizerFast", legacy=False, **SP)
    assert newer.encode("a</s>a") == [1, space, a, 2, a]
    other = by_class(tmp_path / "c", tokenizer_class="BaichuanTokenizer", add_bos_token=False, add_eos_token=True, **SP)
    assert other.encode("a") == [space, a, 2]


def test_tokens_are_added_where_the_files_say(tmp_path: Path) -> None:
    decoder = {"300": {"content": "<tool>", "special": False, "rstrip": True}, "263": {"content": "[PAD]"}}
    tok = by_class(
        tmp_path / "a", tokenizer_class="LlamaTokenizer", added_tokens_decoder=decoder, pad_token="[PAD]", **SP
    )
    assert tok.encode("a<tool>  a[PAD]")[1:] == [259, 260, 300, 259, 260, 263]
    assert tok.special_ids == {0, 1, 2, 263}
    more = by_class(tmp_path / "b", tokenizer_class="LlamaTokenizer", additional_special_tokens=["<x>", "<y>"], **SP)
    assert more.encode("<y><x>", add_special_tokens=False) == [264, 263]
    older = written(tmp_path / "b", {}, added_tokens={"<z>": 270})
    assert Tokenizer.from_dir(older).encode("<z><x>", add_special_tokens=False) == [270, 271]


def test_t5_ends_with_its_token_and_its_sentinels_count_down(tmp_path: Path) -> None:
    start: list[Piece] = [("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]
    files = {"spiece.model": model(start + LETTERS)}
    tok = Tokenizer.from_dir(written(tmp_path, files, config={"model_type": "t5"}))
    assert tok.encode(" a ") == [3, 4, 1]
    assert tok.encode("<extra_id_0>a<extra_id_99>") == [106, 3, 4, 7, 1]
    assert tok.encode("") == [1]
    assert tok.vocab_size == 107


def test_gemma_has_no_leading_space(tmp_path: Path) -> None:
    start: list[Piece] = [
        ("<pad>", 0.0, CONTROL),
        ("<eos>", 0.0, CONTROL),
        ("<bos>", 0.0, CONTROL),
        ("<unk>", 0.0, UNKNOWN),
    ]
    files = {"tokenizer.model": model([*start, ("\n\n", 0.0, USER), *BYTES, *LETTERS], {**BPE, 35: 1}, {3: 0, 4: 0})}
    tok = Tokenizer.from_dir(written(tmp_path, files, tokenizer_config={"tokenizer_class": "GemmaTokenizer"}))
    assert tok.encode("a\n\n a") == [2, 262, 4, 261, 262]
    assert tok.decode([2, 262, 4, 261, 262]) == "a\n\n a"


def test_chatglm_stands_behind_its_prefix(tmp_path: Path) -> None:
    """Version 2 and 3 in front, the first version behind, with names for white space."""
    tok = by_class(tmp_path / "two", tokenizer_class="ChatGLMTokenizer")
    assert tok.encode("a") == [264, 266, 259, 260]  # [gMASK] sop
    assert tok.token_to_id("eop") == 267
    blanks: list[Piece] = [(text, 0.0, USER) for text in ("<n>", "<|tab|>", "<|blank_2|>", "<|blank_3|>")]
    ends: list[Piece] = [("[gMASK]", 0.0, CONTROL), ("<sop>", 0.0, CONTROL)]
    files = {"ice_text.model": model([*START, *LETTERS, *blanks, *ends])}
    one = Tokenizer.from_dir(written(tmp_path / "one", files, tokenizer_config={"tokenizer_class": "ChatGLMTokenizer"}))
    ids = [3, 4, 7, 8, 5, 10, 6]
    assert one.encode("a\n\tb   c") == [*ids, 11, 12]
    assert one.decode(ids) == "a\n\tb   c"


def bpe_files(tok: tokenizers.Tokenizer) -> dict[str, bytes | str]:
    state = json.loads(tok.to_str())["model"]
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["merges"]]
    return {"vocab.json": json.dumps(state["vocab"]), "merges.txt": "\n".join(["#version: 0.2", *lines, ""])}


CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("GPT2Tokenizer", {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "add_prefix_space": False}),
    ("GPT2Tokenizer", {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "add_prefix_space": True}),
    ("CodeGenTokenizer", {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}),
    ("RobertaTokenizer", {**SP, "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<s>", "mask_token": "<s>"}),
    ("Qwen2Tokenizer", {"eos_token": "</s>", "unk_token": "</s>", "pad_token": "</s>"}),
]


@pytest.mark.parametrize(("name", "config"), CLASSES)
def test_merges_give_the_ids_of_transformers(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    files = written(tmp_path, bpe_files(byte_level()), tokenizer_config={"tokenizer_class": name, **config})
    (files / "added_tokens.json").write_text(json.dumps({"    ": 420, "<|im_end|>": 3}))
    ours = Tokenizer.from_dir(files)
    theirs = getattr(transformers, name).from_pretrained(files)
    random.seed(name)
    texts = ["In the beginning, 水 é e\u0301 🦊\n 1234  <|im_end|> I'LL", "", "a     b", *("".join(
        random.choices("the quick  \n\r'sL0é水,.<>", k=30)) for _ in range(50))]  # fmt: skip
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text


def test_opt_and_bart(tmp_path: Path) -> None:
    """OPT is GPT-2's with a token in front; BART's stand around, and its mask takes the space before it."""
    facts = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>"}
    opt = Tokenizer.from_dir(written(tmp_path / "opt", bpe_files(byte_level()), tokenizer_config=facts))
    plain = opt.encode("the fox", add_special_tokens=False)
    assert opt.encode("the fox") == [1, *plain]
    bart = written(
        tmp_path / "bart", bpe_files(byte_level()), config={"model_type": "bart"}, added_tokens={"<mask>": 421}
    )
    tok = Tokenizer.from_dir(bart)
    assert tok.encode("the fox") == [0, *plain, 1]
    assert tok.encode("the <mask>") == [0, *tok.encode("the", False), 421, 1]


def test_a_copy_has_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    """The class came from config.json, which an engine does not have."""
    source = written(tmp_path / "a", {"spiece.model": published("unigram")}, config={"model_type": "t5"})
    (tmp_path / "b").mkdir()
    copy_text(source, tmp_path / "b")
    copied, own = Tokenizer.from_dir(tmp_path / "b"), Tokenizer.from_dir(source)
    assert {p.name for p in copied.files()} == {"spiece.model", "tokenizer.json"}
    for text, _ in facts()["sentencepiece"]["unigram"]["encodings"]:
        assert copied.encode(text) == own.encode(text)
    unknown = written(tmp_path / "c", {"tokenizer.model": published("bpe")})
    (tmp_path / "d").mkdir()
    copy_text(unknown, tmp_path / "d")
    with pytest.raises(TokenizerError, match=r"class None of its tokenizer\.model is not known"):
        Tokenizer.from_dir(tmp_path / "d")


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 pieces are the unknown one"),
    "text": (b"\nhello", "no SentencePiece model"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1", "no SentencePiece model"),
    "twice": (model([*START, ("a", 0.0, 1), ("a", 0.0, 1)]), "'a' is there twice"),
    "unused": (model([*START, ("a", 0.0, UNUSED)]), "marked unused"),
    "words": (model(START, {3: 3}), "model type 3"),
    "bytes": (model([*START, *BYTES[:9], *BYTES[10:]], {**BPE, 35: 1}), "without the piece '<0x09>'"),
    "suffix": (model(START, {24: 1}), "treat_whitespace_as_suffix"),
    "escape": (model(START, {}, {5: 0}), "not escaped"),
    "denormal": (model(START, more=field(5, field(2, b"x"))), "a denormalizer"),
    "kind": (model([*START, ("a", 0.0, 9)]), "no SentencePiece model"),
    "no text": (model([*START, ("", 0.0, 1)]), "a piece without text"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_damaged_or_not_implemented_is_refused(case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(TokenizerError, match=message):
        sentencepiece.parse(data, "m")


def test_any_damage_is_a_typed_error() -> None:
    data = bytearray(published("unigram-bytes"))
    random.seed(0)
    for _ in range(1500):
        broken = bytearray(data)
        for _ in range(random.choice((1, 3))):
            broken[random.randrange(len(data))] = random.randrange(256)
        attempt(lambda broken=broken: sentencepiece.parse(bytes(broken[: random.choice((None, 50, 3000))]), "m"))


def attempt(parse: Callable[[], object]) -> None:
    with contextlib.suppress(TokenizerError):
        parse()


T5 = {"tokenizer_class": "T5Tokenizer"}
WRONG: list[tuple[dict[str, bytes | str], dict[str, Any], str]] = [
    ({"tokenizer.model": "x"}, {"tokenizer_class": "NewTokenizer"}, "class 'NewTokenizer' of its tokenizer.model"),
    ({"vocab.txt": "x"}, {}, r"no tokenizer.json \(only vocab.txt\); write one where transformers"),
    ({}, {}, "no other tokenizer file either"),
    ({}, {}, "neither config.json nor engine.json: it holds no model"),
    ({"config.json": "{}"}, {}, r"AutoTokenizer.*; in Python LLM\(DIR, skip_tokenizer_init=True\)"),
    ({"vocab.json": "{}", "merges.txt": ""}, {"tokenizer_class": "GPT2Tokenizer"}, "must map each token to an id"),
    ({"vocab.json": '{"a": 0, "b": 0}'}, {"tokenizer_class": "GPT2Tokenizer"}, "must map each token to an id"),
    ({"vocab.json": '{"a": 0}'}, {"tokenizer_class": "GPT2Tokenizer"}, "merges.txt"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "a a"}, {"tokenizer_class": "GPT2Tokenizer"}, "line 1: 'a a'"),
    ({"qwen.tiktoken": "YQ== 0\nYg==\n"}, {"tokenizer_class": "QWenTokenizer"}, r"line 2: b'Yg==' is not a token"),
    ({"qwen.tiktoken": "YQ== 0\n"}, {"tokenizer_class": "QWenTokenizer"}, "lacks the token of byte"),
    ({"x.tiktoken": "YQ== 0\n"}, {"tokenizer_class": "GPT2Tokenizer"}, "not how a text is cut"),
    ({"spiece.model": model(START)}, {**T5, "extra_ids": -1}, "extra_ids=-1"),
    ({"spiece.model": model(START)}, {**T5, "added_tokens_decoder": {"x": "a"}}, "no id of an"),
    ({"spiece.model": model(START)}, {**T5, "added_tokens_decoder": {"1": "a"}}, "claims id 1"),
    ({"spiece.model": model(START)}, {**T5, "added_tokens_decoder": {"900": "a"}}, "follow each"),
    ({"tokenizer.model": model(START, BPE)}, {"tokenizer_class": "GemmaTokenizer"}, "'<bos>' stands around every text"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "config", "message"), WRONG)
def test_bad_directories(files: dict[str, bytes | str], config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_dir(written(tmp_path, files, tokenizer_config=config))


def test_a_token_that_no_merge_makes_is_taken_whole(tmp_path: Path) -> None:
    """tiktoken looks a piece up before it merges."""
    lines = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)] + [base64.b64encode(b"abc") + b" 256"]
    config = {"tokenizer_class": "QWenTokenizer"}
    tok = Tokenizer.from_dir(written(tmp_path, {"qwen.tiktoken": b"\n".join(lines)}, tokenizer_config=config))
    assert tok.encode("abc xabc") == [256, *b" xabc"]


def test_a_unigram_models_own_symbols_come_before_likelier_pieces() -> None:
    """By SentencePiece's rule for their score, whatever is stored."""
    pieces = [*START, ("▁", -3.0, NORMAL), *((c, -2.0 - i, NORMAL) for i, c in enumerate("abc")), ("bc", -90.0, USER)]
    tok = Tokenizer(sentencepiece.parse(model(pieces), "m").build({}))
    assert tok.encode("abc cb") == [3, 4, 7, 3, 6, 5]


def test_all_merges_is_the_greedy_walk_of_the_library() -> None:
    """A token that several pairs make up is merged from the left."""
    ranks = {text: rank for rank, text in enumerate(["a", "b", "aa", "ab", "aaa", "aab", "aaaa"])}
    from penstock.text.merges import all_merges

    merges = all_merges(list(ranks), ranks.__getitem__)
    assert merges[:2] == [("a", "a"), ("a", "b")]
    tok = tokenizers.Tokenizer(models.BPE(ranks, merges))
    assert tok.encode("aaaaaab").tokens == ["aaaa", "aab"]
