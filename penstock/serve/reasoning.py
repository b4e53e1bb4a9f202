"""What a model thought and what it said: `<think>...</think>` in front of the answer, as Qwen3 and its kin write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from penstock.serve.tools.events import CallStart, Event, Parser, PlainText, Reader, Reasoning, WasReasoning, append
from penstock.serve.tools.parser import SPACE
from penstock.text.detokenize import overlap

OPEN: Final = "<think>"
CLOSE: Final = "</think>"

ReasoningStyle = Literal["qwen3", "none"]


def detect_reasoning(template: str) -> ReasoningStyle:
    """By whether the chat template speaks of `</think>`: takes it out of older answers, or writes it itself."""
    return "qwen3" if CLOSE in template else "none"


def prompt_state(prompt: str) -> Literal["open", "closed", "none"]:
    """Where a rendered prompt leaves the thought: it ends with `<think>`, with `</think>` (no thought is wanted), or
    with neither."""
    end = prompt[-100:].rstrip()
    return "open" if end.endswith(OPEN) else "closed" if end.endswith(CLOSE) else "none"


class ReasoningParser(Reader):
    """Splits the text before `</think>` from the answer, and gives the answer to `inner`.

    The thought begins where the prompt opened it, or with a `<think>` that begins the text. Where neither was but an
    end comes, all until there was the thought (`WasReasoning`), unless a tool was called in it or the prompt closed it.
    White space around the markers is theirs. One thought a text: later markers are content.
    """

    def __init__(self, prompt: str = "", inner: Callable[[], Parser] = PlainText) -> None:
        state = prompt_state(prompt)
        super().__init__({"open": self._in_thought, "closed": self._in_answer, "none": self._first}[state])
        self._make = inner
        self._inner = inner()
        self._spoke = self._called = False

    def finish(self) -> list[Event]:
        if self._state == self._in_thought:
            self._think(self._held)
        else:
            self._answer("".join(self._space) + self._held)
        self._add(self._inner.finish())
        return self._take()

    def _add(self, events: list[Event]) -> None:
        for event in events:
            self._called = self._called or isinstance(event, CallStart)
            append(self._events, event)

    def _answer(self, text: str) -> None:
        self._add(self._inner.feed(text))

    def _think(self, text: str) -> None:
        if body := text.rstrip(SPACE):
            spoken = "".join(self._space) + body if self._spoke else body.lstrip(SPACE)
            self._add([Reasoning(spoken)])
            self._space, self._spoke = [], True
        self._space.append(text[len(body) :])

    def _first(self, text: str, at: int) -> int:
        if text[at] in SPACE:
            self._space.append(text[at])
            return at + 1
        if text.startswith(OPEN, at):
            self._space, self._state = [], self._in_thought
            return at + len(OPEN)
        if OPEN.startswith(text[at : at + len(OPEN)]):
            self._held = text[at:]
            return len(text)
        self._answer("".join(self._space))
        self._space, self._state = [], self._unopened
        return at

    def _in_thought(self, text: str, at: int) -> int:
        end = text.find(CLOSE, at)
        if end < 0:
            return self._hold(text, at, self._think)
        self._think(text[at:end])
        self._space, self._state = [], self._closed
        return end + len(CLOSE)

    def _closed(self, text: str, at: int) -> int:
        if text[at] not in SPACE:
            self._state = self._in_answer
            return at
        return at + 1

    def _unopened(self, text: str, at: int) -> int:
        end = text.find(CLOSE, at)
        if end < 0:
            return self._hold(text, at, self._answer)
        self._answer(text[at:end])
        return self._reclaim(end)

    def _reclaim(self, at: int) -> int:
        """An end without a beginning."""
        if self._called:
            self._state = self._in_answer
            return at
        self._add(self._inner.finish())
        self._events.append(WasReasoning())
        self._inner, self._state = self._make(), self._closed
        return at + len(CLOSE)

    def _in_answer(self, text: str, at: int) -> int:
        self._answer(text[at:])
        return len(text)

    def _hold(self, text: str, at: int, say: Callable[[str], None]) -> int:
        keep = overlap(text, CLOSE, at)
        say(text[at : len(text) - keep])
        self._held = text[len(text) - keep :]
        return len(text)
