"""Text as it comes: equal to decoding everything at once, whole characters only, stop strings wherever they fall."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import SamplingError
from penstock.text import IncrementalDetokenizer, StopStrings, Tokenizer
from tests.cpu.text.conftest import CORPUS, MAKERS

TOKENIZERS = {name: Tokenizer(make()) for name, make in MAKERS.items()}
EVERY = pytest.mark.parametrize("name", sorted(TOKENIZERS))
TEXTS = st.text() | st.text(alphabet=" aé水🦊the\n<s>\ufffd", max_size=30) | st.sampled_from(CORPUS)


def pieces(tok: Tokenizer, ids: list[int], prompt: list[int] | None = None, skip: bool = True) -> list[str]:
    stream = IncrementalDetokenizer(tok, prompt or [], skip_special_tokens=skip)
    return [*(stream.add(token_id) for token_id in ids), stream.finish()]


@EVERY
@settings(max_examples=300)
@given(text=TEXTS, skip=st.booleans())
def test_the_pieces_are_the_text(name: str, text: str, skip: bool) -> None:
    tok = TOKENIZERS[name]
    ids = tok.encode(text)
    assert "".join(pieces(tok, ids, skip=skip)) == tok.decode(ids, skip)


@EVERY
@settings(max_examples=300)
@given(data=st.data())
def test_the_pieces_are_the_text_of_any_ids(name: str, data: st.DataObject) -> None:
    tok = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size + 2), max_size=40))
    skip = data.draw(st.booleans())
    whole, streamed = tok.decode(ids, skip), "".join(pieces(tok, ids, skip=skip))
    if name == "byte_fallback" and "\ufffd" in whole:
        # decode() undoes whole characters of a broken run of bytes; a stream cannot take them back.
        assert len(streamed) <= len(whole)
    else:
        assert streamed == whole


@EVERY
@settings(max_examples=200)
@given(text=TEXTS.filter(lambda t: "\ufffd" not in t))
def test_no_piece_ends_in_part_of_a_character(name: str, text: str) -> None:
    tok = TOKENIZERS[name]
    assert all("\ufffd" not in piece for piece in pieces(tok, tok.encode(text)))


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(max_examples=200)
@given(data=st.data())
def test_a_prompt_and_its_continuation_are_one_text(name: str, data: st.DataObject) -> None:
    tok = TOKENIZERS[name]
    text = data.draw(TEXTS.filter(lambda t: "\ufffd" not in t))
    ids = tok.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    before = tok.decode(ids[:cut])
    if "\ufffd" not in before:
        assert before + "".join(pieces(tok, ids[cut:], ids[:cut])) == tok.decode(ids)


def test_a_character_comes_as_soon_as_it_is_whole() -> None:
    for tok in (TOKENIZERS["byte_level"], TOKENIZERS["byte_fallback"]):
        ids = tok.encode("🦊🦊", add_special_tokens=False)[-8:]
        assert len(ids) == 8
        assert pieces(tok, ids, prompt=tok.encode("a")) == ["", "", "", "🦊", "", "", "", "🦊", ""]


def test_a_words_leading_space_depends_on_the_prompt() -> None:
    tok = TOKENIZERS["byte_fallback"]
    ids = tok.encode("the", add_special_tokens=False)
    assert "".join(pieces(tok, ids)) == "the"
    assert "".join(pieces(tok, ids, prompt=tok.encode("a"))) == " the"
    special = [tok.token_to_id("<|im_end|>")]
    assert "".join(pieces(tok, ids + special + ids)) == "the the"  # type: ignore[operator]


def test_an_added_token_outside_the_byte_table_stands_for_its_own_text() -> None:
    tok = TOKENIZERS["byte_level"]
    ids = tok.encode("水<tool é>x")
    assert tok.token_to_id("<tool é>") in ids
    assert "".join(pieces(tok, ids)) == tok.decode(ids) == "水<tool é>x"


def test_broken_bytes_do_not_hold_the_stream_for_ever() -> None:
    for tok in (TOKENIZERS["byte_level"], TOKENIZERS["byte_fallback"]):
        token = tok.token_to_id("<0xE4>") or tok.encode("水")[0]
        stream = IncrementalDetokenizer(tok)
        assert any([stream.add(token) for _ in range(100)])


def first_match(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The definition: complete first, and of those the longest."""
    found = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    return (min(found)[0] + min(found)[1], min(found)[2]) if found else None


SMALL = st.text(alphabet="ab水", max_size=24)
STOPS = st.lists(st.text(alphabet="ab水", min_size=1, max_size=5), max_size=4)


@settings(max_examples=1000)
@given(chunks=st.lists(SMALL, max_size=12), stops=STOPS, include=st.booleans())
def test_stop_strings_are_found_wherever_the_borders_fall(chunks: list[str], stops: list[str], include: bool) -> None:
    text, stream = "".join(chunks), StopStrings(stops, include=include)
    emitted = "".join([*map(stream.add, chunks), stream.finish()])
    match = first_match(text, stops)
    if match is None:
        assert (emitted, stream.matched) == (text, None)
    else:
        begin, stop = match
        assert (emitted, stream.matched) == (text[: begin + len(stop) * include], stop)


@settings(max_examples=500)
@given(chunks=st.lists(SMALL, max_size=12), stops=STOPS)
def test_no_more_is_held_back_than_may_become_a_stop(chunks: list[str], stops: list[str]) -> None:
    stream, seen, emitted = StopStrings(stops), "", ""
    for chunk in chunks:
        seen, emitted = seen + chunk, emitted + stream.add(chunk)
        if stream.matched is not None:
            break
        held = seen[len(emitted) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(SamplingError, match="empty string"):
        StopStrings(["a", ""])
