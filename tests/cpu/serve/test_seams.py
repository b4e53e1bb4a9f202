"""Where threads and processes meet: what one of them does in between must not show."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest

from penstock import SamplingParams, bundled
from penstock.errors import OptionError, QueueFullError
from penstock.grammar import GuidedDecoding
from penstock.grammar.compiled import Compiled
from penstock.grammar.process import Compiler
from penstock.grammar.vocabulary import vocabulary_of
from penstock.runtime.requests import CompletionOutput, RequestMetrics, RequestOutput
from penstock.runtime.schedule.request import Request
from penstock.runtime.tokens import TokenStream
from penstock.serve import client
from penstock.serve.client import EngineClient, joined
from penstock.serve.engine.desk import Desk
from penstock.serve.wire import HEADER, Failed, Forget, Learn, Part, Submit, Times, read_to_engine
from penstock.text import Tokenizer

END = 7


def stream() -> TokenStream:
    request = Request("a", (1, 2), 9, 99, frozenset({END}), frozenset(), False)
    return TokenStream(request, None, SamplingParams(), 0.0, None, order_id="a", hear=lambda text: None)


def test_a_token_that_ends_a_text_is_taken_with_its_end() -> None:
    """Between the two, on the executor's thread, another thread may take what there is."""
    text = stream()
    text.add(5, 0.0)
    assert text.take() == (True, [5], None, False)
    text.add(END, 0.0)
    assert text.take() == (False, [], None, False)
    assert text.take() == (False, [], None, False)
    text.end("stop", 0.0)
    assert text.take() == (False, [END], None, True) and text.ended_by_token


def test_a_first_token_that_ends_a_text_stays_the_first() -> None:
    text = stream()
    text.add(END, 0.0)
    assert text.take().tokens == []
    text.end("stop", 0.0)
    assert text.take() == (True, [END], None, True)


def test_parts_joined_keep_the_times_of_the_first() -> None:
    times = Times(1.0, admitted=2.0, reused_tokens=16)
    first, second = Part("a", 0, [1], times=times), Part("a", 0, [2])
    assert joined([first, second]) == [Part("a", 0, [1, 2], times=times)]
    last = Part("a", 0, [3], "stop", times=Times(1.0, finished=3.0))
    assert joined([Part("a", 0, [1], times=times), last])[0].times == last.times


def test_what_is_new_before_a_desk_closes_comes_and_nothing_waits_behind() -> None:
    desk = Desk(SimpleNamespace(executor=SimpleNamespace(busy=False)))  # type: ignore[arg-type]
    output = CompletionOutput(0, "", (1,), "stop", None)
    desk._hear_all("a", RequestOutput("a", None, (1,), (output,), True, RequestMetrics(0.0)))
    desk._fail("b", OptionError("no"))
    assert not desk.closed
    desk.close()
    parts, failed = desk.wait()
    assert [each.id for each in parts] == ["a"] and failed == [Failed("b", "OptionError", "no")] and desk.closed


def test_a_process_that_does_not_read_gets_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        link = EngineClient()
        transport: Any = SimpleNamespace(write=lambda data: None, get_write_buffer_size=lambda: 101)
        link.connected(transport)
        link.state = "ready"
        link.submit(Submit("a", [1]))
        monkeypatch.setattr(client, "MOST_UNREAD", 100)
        with pytest.raises(QueueFullError, match="101 bytes"):
            link.submit(Submit("b", [1]))
        assert link.num_open == 1

    asyncio.run(run())


def test_a_process_is_taught_a_grammar_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for a large vocabulary it has megabytes, which need not go with each request."""

    async def run() -> None:
        monkeypatch.setattr(client, "CACHED", 250)
        link, told = EngineClient(), list[str]()

        def connect() -> None:
            def write(data: bytes) -> None:
                message = read_to_engine(data[HEADER.size :])
                key = message.key if isinstance(message, Forget) else b""
                key = Compiled(message.body).key if isinstance(message, Learn) else key
                told.append(type(message).__name__ + key[:1].hex())

            transport: Any = SimpleNamespace(write=write, get_write_buffer_size=lambda: 0)
            link.connected(transport)
            link.state = "ready"

        def ask(*grammars: Compiled) -> list[str]:
            told.clear()
            for each in grammars:
                link.submit(Submit(f"{len(told)}{link.num_open}", [1], grammar=each.key), each)
            return [word for word in told if word != "Submit"]

        a, b, c = (Compiled(letter * 100) for letter in (b"a", b"b", b"c"))
        names = {each: each.key[:1].hex() for each in (a, b, c)}
        connect()
        assert ask(a, a, b, a) == [f"Learn{names[a]}", f"Learn{names[b]}"]
        assert ask(c) == [f"Learn{names[c]}", f"Forget{names[b]}"]
        assert ask(a, c) == []
        connect()
        assert ask(c) == [f"Learn{names[c]}"]
        assert ask(Compiled(b"d" * 1000))[-1] == f"Forget{names[c]}"
        connect()
        assert len(ask(*(Compiled(b"%d" % i) for i in range(client.KEPT + 2)))) == client.KEPT + 4  # small ones too

    asyncio.run(run())


def test_a_grammar_that_was_never_taught_is_the_servers_fault() -> None:
    desk = Desk(SimpleNamespace(executor=SimpleNamespace(busy=False, prepare=None)))  # type: ignore[arg-type]
    key = Compiled(b"a").key
    for said in (Learn(b"a"), Forget(key)):
        desk.learn(said)
    desk.submit(Submit("a", [1], grammar=key))
    _, (failed,) = desk.wait()
    assert failed.kind == "ExecutorError" and key.hex() in failed.message


def test_a_ctrl_c_at_the_terminal_is_not_for_the_process_of_grammars() -> None:
    compiler = Compiler(lambda: vocabulary_of(Tokenizer.from_dir(bundled.target()), 4096, [0]))
    try:
        compiler.compile(GuidedDecoding(regex="a"))
        assert compiler._process is not None
        assert os.getpgid(compiler._process.pid) == compiler._process.pid != os.getpgrp()
    finally:
        compiler.close()
