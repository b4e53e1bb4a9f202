"""Compiling: what is asked, what it may cost, and that whatever it does the next one is served."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from penstock.errors import QueueFullError, SamplingError
from penstock.grammar import GuidedDecoding, guided, process
from penstock.grammar.compiled import Compiled
from penstock.grammar.guide import FIRST_SECONDS, SHARE, Filler, Guide, _Read
from penstock.grammar.process import Compiler
from penstock.text import Tokenizer
from tests.cpu.grammar.conftest import Walker

SECONDS = 1.5
ASKED: dict[str, dict[str, Any]] = {
    "regex": {"regex": r"[a-z]{2,4} [0-9]+(\.[0-9]{2})?"},
    "choice": {"choice": ["yes", 'n"o\\', "ja\n", "naïve 漢", "yes please"]},
    "grammar": {"grammar": 'root ::= item ("+" item)*\nitem ::= [0-9]+ | "(" root ")"'},
}
BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "asks for nothing"),
    ({"regex": "a", "json_object": True}, "json_object and regex"),
    ({"regex": ""}, "1 character or more"),
    ({"regex": 3}, "regex holds 3"),
    ({"json_object": 1}, "not True or False"),
    ({"choice": []}, "no list of 1 to"),
    ({"choice": "yes"}, "no list of 1 to"),
    ({"choice": ["a"] * 10_001}, "no list of 1 to 10000"),
    ({"choice": ["x" * 200] * 9000}, "over 262144 characters"),
    ({"regex": "a" * 300_000}, "300000 characters"),
    ({"regex": "\ud800"}, "half a character"),
    ({"json": {"a": {1, 2}}}, "cannot be written as JSON"),
    ({"json": []}, "json holds"),
]
HOSTILE: dict[str, dict[str, Any]] = {
    "nested quantifiers": {"regex": "((((a+)+)+)+)+b"},
    "huge repeats": {"regex": "a{1,1000000}"},
    "repeats of repeats": {"regex": "((a{1,100}){1,100}){1,100}"},
    "a long memory": {"regex": ".*a.{14}"},
    "deep parentheses": {"regex": "(" * 50_000 + "a" + ")" * 50_000},
    "alternatives": {"choice": [f"choice {i}" for i in range(10_000)]},
    "deep grammar": {"grammar": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000},
    "left recursion": {"grammar": 'root ::= root root | "a" | ""'},
    "never ends": {"grammar": 'root ::= "a" root'},
    "broken range": {"grammar": "root ::= [\\xff-\\xfe]"},
    "surrogates": {"regex": "[\\ud800-\\udfff]+"},
    "not a grammar": {"grammar": "\\\\\\ ::= ((("},
    "itself": {"json": {"$ref": "#"}},
    "deep schema": {"json": '{"items":' * 20_000 + "{}" + "}" * 20_000},
    "many values": {"json": {"enum": [f"v{i}" for i in range(15_000)]}},
    "long text": {"json": {"type": "string", "maxLength": 1_000_000}},
    "many optional": {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(400)}}},
    "many shapes": {"json": {"anyOf": [{"properties": {f"a{i}": {"type": "string"}}} for i in range(500)]}},
    "large numbers": {"json": '{"type": "integer", "minimum": -1e308, "maximum": 1e309}'},
}  # fmt: skip


@pytest.fixture(scope="module")
def hasty(walker: Walker) -> Any:
    compiler = Compiler(lambda: walker.vocabulary, seconds=SECONDS, memory=512 << 20)
    compiler.compile(GuidedDecoding(regex="started"))
    yield compiler
    compiler.close()


@pytest.mark.parametrize(("asked", "why"), BAD)
def test_bad_values_name_what_is_wrong(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(SamplingError) as caught:
        GuidedDecoding(**asked)
    assert why in str(caught.value) and len(str(caught.value)) < 300


def test_a_record_is_what_it_says() -> None:
    assert GuidedDecoding(json={"type": "null"}) == GuidedDecoding(json='{"type": "null"}')
    assert [GuidedDecoding(**each).kind for each in ASKED.values()] == [*ASKED]
    assert {"json", "json_object", "structural_tag"} | ASKED.keys() == {*guided.KINDS}


@pytest.mark.parametrize("kind", ASKED)
def test_every_walk_gives_a_text_of_the_grammar(walker: Walker, tokenizer: Tokenizer, kind: str) -> None:
    texts = [walker.walk(GuidedDecoding(**ASKED[kind]), seed) for seed in range(30)]
    found = {tokenizer.decode(each) for each in texts if each is not None}
    assert found
    for text in found:
        if kind == "regex":
            assert re.fullmatch(ASKED["regex"]["regex"], text)
        elif kind == "choice":
            assert text in ASKED["choice"]["choice"]
        else:
            assert re.fullmatch(r"[0-9+()]+", text) and text.count("(") == text.count(")")
    assert kind != "choice" or found == {*ASKED["choice"]["choice"]}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_hostile_are_served_or_refused_in_time(hasty: Compiler, name: str) -> None:
    start = time.monotonic()
    try:
        assert len(hasty.compile(GuidedDecoding(**HOSTILE[name])).body) <= 16 << 20
    except SamplingError as error:
        assert len(str(error)) < 500
    assert time.monotonic() - start < SECONDS + 2.5
    start = time.monotonic()
    hasty.compile(GuidedDecoding(regex=f"next {len(name)}"))
    assert time.monotonic() - start < 2


def test_the_hostile_do_not_hold_up_others(hasty: Compiler) -> None:
    def hostile() -> None:
        with pytest.raises(SamplingError, match=r"took over 1\.5 s or 512 MiB"):
            hasty.compile(GuidedDecoding(**HOSTILE["many optional"]))

    threads = [threading.Thread(target=hostile) for _ in range(2)]
    for each in threads:
        each.start()
    time.sleep(0.3)
    start = time.monotonic()
    hasty.compile(GuidedDecoding(regex="beside"))
    assert time.monotonic() - start < 1.0
    for each in threads:
        each.join()


def test_results_and_refusals_are_kept(hasty: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hasty.compile(GuidedDecoding(regex="kept"))
    with pytest.raises(SamplingError, match="Lookahead"):
        hasty.compile(GuidedDecoding(regex="(?=a)b"))
    monkeypatch.setattr(hasty, "_in_turn", None)
    assert hasty.compile(GuidedDecoding(regex="kept")) is first
    with pytest.raises(SamplingError, match="Lookahead"):
        hasty.compile(GuidedDecoding(regex="(?=a)b"))


def test_the_least_recently_used_make_room(hasty: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "CACHED", 20_000)
    for number in range(40):
        hasty.compile(GuidedDecoding(regex=f"room {number}"))
    assert hasty._cached <= 20_000
    assert hasty.cached(GuidedDecoding(regex="room 0")) is None
    assert hasty.cached(GuidedDecoding(regex="room 39")) is not None


def test_a_full_queue_is_refused(hasty: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MOST_WAITING", 0)
    with pytest.raises(QueueFullError, match="0 grammars wait"):
        hasty.compile(GuidedDecoding(regex="full"))


def test_a_process_that_died_is_started_again(hasty: Compiler) -> None:
    assert hasty._process is not None
    os.kill(hasty._process.pid, signal.SIGKILL)
    hasty._process.wait()
    assert hasty.compile(GuidedDecoding(regex="again"))


@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_ends_or_hangs_under_a_request_is_started_again(hasty: Compiler, ends: signal.Signals) -> None:
    stopped = hasty._process
    assert stopped is not None
    os.kill(stopped.pid, signal.SIGSTOP)
    timer = threading.Timer(0.3, os.kill, (stopped.pid, ends))
    timer.start()
    assert hasty.compile(GuidedDecoding(regex=f"under {ends.name} [0-9]"))
    timer.join()
    assert hasty._process is not stopped


def test_what_was_compiled_for_others_is_refused(walker: Walker) -> None:
    compiled = walker.compiler.compile(GuidedDecoding(regex="a+")).body
    for wrong in (b"", b"{}", b"\xff", compiled[: len(compiled) // 2], json.dumps([1]).encode()):
        with pytest.raises(SamplingError, match="not compiled for this engine"):
            walker.grammars.guide(Compiled(wrong))


def test_a_guide_goes_back_and_says_what_is_not_of_the_grammar(walker: Walker) -> None:
    guide = walker.guide(GuidedDecoding(grammar="root ::= [a-z]+"))
    a, b, nine = (walker.vocabulary.tokens.index(each) for each in (b"a", b"b", b"9"))
    behind = walker.allowed(guide, [a, b, a])
    assert walker.allowed(guide, [a]) == behind == walker.allowed(guide, [a, b, a])
    with pytest.raises(SamplingError, match=f"token {nine}, the text's 2th, is not of the grammar"):
        guide.fill([a, nine], (), np.zeros((1, 200), np.int32), 0)


def test_a_guide_goes_on_with_a_list_that_grows(walker: Walker) -> None:
    """It looks at what is new alone, and at all of it where tokens were lost."""
    asked, words = GuidedDecoding(choice=["abcd", "abxy"]), -(-walker.vocabulary.size // 32)
    a, b, c, x = (walker.vocabulary.tokens.index(each) for each in (b"a", b"b", b"c", b"x"))
    guide, text, found, fresh = walker.guide(asked), [a], *np.zeros((2, 1, words), np.int32)
    steps: list[tuple[list[int], list[int]]] = [
        ([], []), ([], [b]), ([], [b, c]), ([], [b]), ([], [b, x]), ([b], [x]), ([x], []),
    ]  # fmt: skip
    for appended, ahead in steps:
        text += appended
        guide.fill(text, ahead, found, 0)
        walker.guide(asked).fill([*text, *ahead], (), fresh, 0)
        assert (found == fresh).all() and (found != -1).any(), (text, ahead)
    guide.fill([a], (), found, 0)
    walker.guide(asked).fill([a], (), fresh, 0)
    assert (found == fresh).all()


def test_masks_that_take_long_end_the_text() -> None:
    class Slow:
        def is_terminated(self) -> bool:
            end = time.thread_time() + FIRST_SECONDS + 0.02
            while time.thread_time() < end:
                pass
            return True

    with pytest.raises(SamplingError, match="checking 0 tokens took"):
        Guide(Slow(), _Read(None)).fill([], (), np.zeros((1, 4), np.int32), 0)


def test_what_a_mask_may_take_is_its_dearest_for_a_while() -> None:
    """Of texts that go through one schema side by side all are dear, or none."""

    class Matcher:
        dear = False

        def is_terminated(self) -> bool:
            end = time.thread_time() + 0.01 * self.dear
            while time.thread_time() < end:
                pass
            return True

    matcher, read, mask = Matcher(), _Read(None), np.zeros((1, 4), np.int32)
    guide = Guide(matcher, read)
    for dear in (True, False, False):
        matcher.dear = dear
        guide.fill([], (), mask, 0)
        assert 0.008 < guide.may_take < 0.05
    assert Guide(matcher, read).may_take == read.dearest >= 0.01
    for _ in range(60):
        guide.fill([], (), mask, 0)
    assert guide.may_take < 0.001


def test_masks_on_several_threads_are_those_of_one(walker: Walker) -> None:
    words, kinds = -(-walker.vocabulary.size // 32), [*ASKED.values(), {"json_object": True}]
    filler, tokens = Filler(), walker.vocabulary.tokens
    filler._count = 3
    try:
        for count in (1, 4, 9):
            asked = [(walker.guide(GuidedDecoding(**kinds[i % 4])), [], []) for i in range(count)]
            wrong = (walker.guide(GuidedDecoding(regex="a+")), [tokens.index(b"b")], [])
            if count > 1:
                wrong[0].may_take = 2.2 * SHARE
            together, alone = np.zeros((2, count + 1, words), np.int32)
            told = filler.fill([*asked, wrong], together)
            assert (filler._threads is None) == (count == 1)
            for row, (guide, text, ahead) in enumerate(asked):
                guide.fill(text, ahead, alone, row)
            assert (together[:count] == alone[:count]).all() and (together[count] == -1).all()
            assert told[:count] == [None] * count and isinstance(told[count], SamplingError)
    finally:
        filler.close()
