"""The tokenizer: what it reads beside tokenizer.json, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import PromptError, TokenizerError
from penstock.text import Tokenizer
from tests.cpu.text.conftest import byte_fallback, byte_level, write

BYTE_LEVEL = byte_level()


def test_it_agrees_with_transformers(tmp_path: Path, backends: dict[str, tokenizers.Tokenizer]) -> None:
    from transformers import PreTrainedTokenizerFast

    text = " In the beginning, 水 é 🦊\n  <|im_end|> x<tool é>y "
    for name, backend in backends.items():
        directory = write(tmp_path / name, backend, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), eos_token="</s>")
        ours = Tokenizer.from_dir(directory)
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.vocab_size == len(theirs)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


@given(st.text())
def test_byte_level_text_survives(text: str) -> None:
    tok = Tokenizer(BYTE_LEVEL)
    assert tok.decode(tok.encode(text), skip_special_tokens=False) == text


def test_ends_are_the_tokenizers_then_the_generation_configs(tmp_path: Path) -> None:
    backend = byte_level()
    end, im_end = backend.token_to_id("</s>"), backend.token_to_id("<|im_end|>")
    directory = write(
        tmp_path / "m",
        backend,
        tokenizer_config={"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}},
        generation_config={"eos_token_id": [end, im_end]},
        config={"eos_token_id": 7},
    )
    tok = Tokenizer.from_dir(directory, eos_token_ids=[9, end])
    assert tok.eos_token_ids == (im_end, end, 9)
    assert tok.eos_token_id == im_end


def test_config_json_says_the_end_only_when_nobody_else_does(tmp_path: Path) -> None:
    assert Tokenizer.from_dir(write(tmp_path, byte_level(), config={"eos_token_id": 7})).eos_token_ids == (7,)


def test_the_older_special_tokens_map_is_read(tmp_path: Path) -> None:
    directory = write(tmp_path, byte_level(), special_tokens_map={"eos_token": "</s>", "bos_token": "<s>"})
    tok = Tokenizer.from_dir(directory)
    assert (tok.bos_token_id, tok.eos_token_ids) == (0, (1,))


def test_bos_is_added_once(tmp_path: Path) -> None:
    asks = {"bos_token": "<s>", "add_bos_token": True}
    adds_itself = Tokenizer.from_dir(write(tmp_path / "a", byte_fallback(), tokenizer_config=asks))
    does_not = Tokenizer.from_dir(write(tmp_path / "b", byte_level(), tokenizer_config=asks))
    silent = Tokenizer.from_dir(write(tmp_path / "c", byte_level(), tokenizer_config={"bos_token": "<s>"}))
    for tok in (adds_itself, does_not):
        assert tok.encode("the").count(tok.bos_token_id) == 1
        assert tok.encode("the")[0] == tok.bos_token_id
        assert tok.bos_token_id not in tok.encode("the", add_special_tokens=False)
    assert does_not.encode("<s>the").count(does_not.bos_token_id) == 1
    assert silent.bos_token_id not in silent.encode("the")


def test_truncation_and_padding_of_a_training_run_are_undone(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tok = Tokenizer.from_dir(write(tmp_path, backend))
    assert len(tok.encode("z")) == 1
    assert tok.decode(tok.encode("the quick brown fox" * 5)) == "the quick brown fox" * 5


def test_files_are_those_to_copy(tmp_path: Path) -> None:
    directory = write(tmp_path, byte_level(), tokenizer_config={}, config={}, generation_config={})
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text("x")
    names = [path.relative_to(directory).as_posix() for path in Tokenizer.from_dir(directory).files()]
    assert names == [
        "additional_chat_templates/rag.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert Tokenizer(byte_level()).files() == ()


def test_a_missing_tokenizer_names_what_is_there_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"x")
    with pytest.raises(TokenizerError, match=r"only vocab\.txt.*save_pretrained"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', "\ufffd"])
def test_a_broken_tokenizer_is_a_typed_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match="is not a tokenizer"):
        Tokenizer.from_dir(tmp_path)


@pytest.mark.parametrize("value", ["</s>", [1, "x"], -1, True])
def test_a_bad_end_is_a_typed_error(tmp_path: Path, value: object) -> None:
    with pytest.raises(TokenizerError, match="eos_token_id"):
        Tokenizer.from_dir(write(tmp_path, byte_level(), generation_config={"eos_token_id": value}))


def test_bad_requests_are_prompt_errors() -> None:
    tok = Tokenizer(BYTE_LEVEL)
    with pytest.raises(PromptError, match=r"lone surrogate, U\+D800 at position 1"):
        tok.encode("a\ud800")
    with pytest.raises(PromptError, match="token id -1 is negative"):
        tok.decode([1, -1])
    assert tok.decode([tok.vocab_size + 5]) == ""
