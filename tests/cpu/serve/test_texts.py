"""From the engine's parts to texts, against an engine that says what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import SamplingParams, bundled
from penstock.errors import ExecutorError, SamplingError
from penstock.serve.choices import completion_logprobs
from penstock.serve.errors import RequestError
from penstock.serve.texts import Answer, Prompt, wire_params
from penstock.serve.wire import Part, Times
from penstock.text import Tokenizer
from penstock.text.spelling import Spelling

TOKENIZER = Tokenizer.from_dir(bundled.target())
SAID = "the quick brown fox jumps over the lazy dog, and the dog jumps back: 123 naïve 🙂"
IDS = TOKENIZER.encode(SAID, add_special_tokens=False)


@dataclass
class Script:
    """A reply that has all its frames already."""

    frames: list[list[Part] | Exception]
    aborts: list[int | None] = field(default_factory=list)

    async def parts(self) -> list[Part]:
        found = self.frames.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def abort(self, index: int | None = None) -> None:
        self.aborts.append(index)


@dataclass
class Heard:
    heard: list[Sequence[Part]] = field(default_factory=list)
    end: list[tuple[BaseException | None, Mapping[int, str] | None]] = field(default_factory=list)

    def parts(self, parts: Sequence[Part]) -> None:
        self.heard.append(parts)

    def ended(self, error: BaseException | None = None, reasons: Mapping[int, str] | None = None) -> None:
        self.end.append((error, reasons))


def cut(ids: list[int], borders: list[int], index: int = 0, **last: Any) -> list[Part]:
    """A text in parts, of which the last has the end."""
    places = sorted({0, len(ids), *(b % (len(ids) + 1) for b in borders)})
    parts = [Part("r", index, ids[a:b]) for a, b in pairwise(places)]
    end = parts.pop()
    return [*parts, Part("r", index, end.tokens, **{"finish": "length", **last})]


def answered(script: Script, heard: Heard | None = None, **params: Any) -> Any:
    async def run() -> Any:
        answer = Answer(script, Prompt([1, 2]), SamplingParams(**params), TOKENIZER, heard)
        with answer:
            texts = await answer.all()
        return answer, texts

    return asyncio.run(run())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 100), max_size=6),
    st.lists(st.sampled_from(["dog", "the dog", "fox jumps", "🙂", "never", "x", "jumps ba"]), max_size=3),
    st.booleans(),
    st.integers(0, 24),
)
def test_a_text_is_the_same_however_it_is_cut(borders: list[int], stop: list[str], include: bool, least: int) -> None:
    told: dict[str, Any] = {"stop": stop, "include_stop_str_in_output": include, "min_tokens": least, "max_tokens": 100}
    whole = answered(Script([cut(IDS, [])]), **told)[1][0]
    frames: list[Any] = [[part] for part in cut(IDS, borders)]
    script = Script(frames)
    text = answered(script, **told)[1][0]
    assert (text.new, text.finish, text.stop_reason, text.num_tokens) == (
        whole.new, whole.finish, whole.stop_reason, whole.num_tokens,
    )  # fmt: skip
    if text.finish == "length":
        assert text.new == SAID and text.num_tokens == len(IDS)
    else:
        assert text.new.endswith(text.stop_reason) == include
        assert SAID.startswith(text.new)


def test_a_stop_string_ends_its_text_in_the_engine_alone_and_what_is_behind_it_does_not_count() -> None:
    heard = Heard()
    script = Script([[Part("r", 0, IDS), Part("r", 1, IDS[:1])], [Part("r", 1, IDS[1:2], "length")]])
    answer, texts = answered(script, heard, n=2, stop="brown", temperature=1.0)
    assert [text.finish for text in texts] == ["stop", "length"]
    assert texts[0].new == "the quick " and texts[0].num_tokens < len(IDS)
    assert script.aborts == [0]
    assert heard.end == [(None, {0: "stop"})] and len(heard.heard) == 2
    assert answer.num_tokens == texts[0].num_tokens + 2


def test_a_token_that_ends_the_text_has_none() -> None:
    text = answered(Script([[Part("r", 0, [*IDS[:2], 1], "stop", ended_by_token=True)]]), skip_special_tokens=False)[1][
        0
    ]
    assert text.new == TOKENIZER.decode(IDS[:2]) and (text.finish, text.stop_reason) == ("stop", None)
    assert text.num_tokens == 3
    stopped = answered(Script([[Part("r", 0, [*IDS[:2], 7], "stop", 7, True)]]), stop_token_ids=[7])[1][0]
    assert stopped.stop_reason == 7 and stopped.new == text.new


def test_the_best_are_those_whose_tokens_were_likeliest() -> None:
    def part(index: int, *values: float) -> Part:
        tokens = IDS[: len(values)]
        logprobs = [{token: value} for token, value in zip(tokens, values, strict=True)]
        return Part("r", index, tokens, "length", logprobs=logprobs)

    frames: list[Any] = [[part(0, -3.0, -1.0)], [part(2, -0.5)], [part(1, -0.25, -0.125), Part("r", 3, [], "timeout")]]
    texts = answered(Script(frames), n=2, best_of=4)[1]
    assert [text.index for text in texts] == [1, 2]


def test_a_beam_search_may_have_fewer_texts_than_asked_for() -> None:
    found = answered(Script([[Part("r", 0, IDS[:2], "length", score=-1.0)]]), n=3, use_beam_search=True)[1]
    assert [text.new for text in found] == [TOKENIZER.decode(IDS[:2])]


def test_a_deadline_cuts_a_text_off_and_says_so_or_refuses_what_never_ran() -> None:
    text = answered(Script([[Part("r", 0, IDS[:2], "timeout")]]))[1][0]
    assert (text.finish, text.stop_reason, text.num_tokens) == ("length", "timeout", 2)
    with pytest.raises(RequestError, match="queue_timeout") as error:
        answered(Script([[Part("r", 0, [], "timeout")]]))
    assert error.value.status == 503 and "retry-after" in error.value.headers


@pytest.mark.parametrize("error", [SamplingError("no"), ExecutorError("died")])
def test_an_error_ends_the_request_and_is_told(error: Exception) -> None:
    heard, script = Heard(), Script([[Part("r", 0, IDS[:2])], error])
    with pytest.raises(type(error)):
        answered(script, heard)
    assert script.aborts == [None] and heard.end == [(error, {})]


def test_an_engine_that_gives_up_a_text_is_an_error() -> None:
    with pytest.raises(ExecutorError, match="abort"):
        answered(Script([[Part("r", 0, IDS[:2], "abort")]]))


def test_what_is_sent_is_what_differs_and_never_the_stop_strings() -> None:
    assert wire_params(SamplingParams()) == {}
    assert wire_params(SamplingParams(stop="x", temperature=0.5, logit_bias={3: 1})) == {
        "temperature": 0.5, "logit_bias": {3: 1},
    }  # fmt: skip


def test_reused_tokens_are_known_at_the_end() -> None:
    answer, _ = answered(Script([[Part("r", 0, IDS[:2], "length", times=Times(0.0, reused_tokens=5))]]))
    assert answer.reused_tokens == 5


def test_rows_of_tokens_spell_their_text_and_begin_where_it_does() -> None:
    logprobs = [{token: -0.5, 5: -1.0, 6: -2.0} for token in IDS]
    text = answered(Script([[Part("r", 0, IDS, "length", logprobs=logprobs)]]), logprobs=2)[1][0]
    rows = completion_logprobs(text.read()[1], Spelling(TOKENIZER), 2, 10)
    for token, offset in zip(rows["tokens"], rows["text_offset"], strict=True):
        assert token.startswith("bytes:") or SAID[offset - 10 :].startswith(token)
    spelt = b"".join(Spelling(TOKENIZER).of(token)[1] for token in IDS)
    assert spelt.decode() == SAID
    assert [len(top) for top in rows["top_logprobs"]] == [2] * len(IDS)


def test_what_was_held_back_comes_at_the_end() -> None:
    ends = TOKENIZER.encode("a 🙂", add_special_tokens=False)
    text = answered(Script([[Part("r", 0, ends[:-1])], [Part("r", 0, [], "length")]]))[1][0]
    assert text.new == "a \ufffd"
    text = answered(Script([[Part("r", 0, IDS)], [Part("r", 0, [], "length")]]), stop="🙂 and more")[1][0]
    assert text.new == SAID and text.stop_reason is None


def test_stop_strings_count_from_the_least_tokens_on() -> None:
    number = next(i for i in range(len(IDS)) if TOKENIZER.decode(IDS[: i + 1]).endswith("quick")) + 1
    for least, stopped in ((number, True), (number + 1, False)):
        text = answered(Script([cut(IDS, [])]), stop="quick", min_tokens=least, max_tokens=100)[1][0]
        assert (text.stop_reason == "quick") == stopped
