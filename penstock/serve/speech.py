"""What an assistant says, as OpenAI writes it: content, reasoning and tool calls, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from penstock.serve.answers import to_json
from penstock.serve.texts import Text
from penstock.serve.tools.events import (
    Arguments,
    CallStart,
    Content,
    Event,
    Message,
    Parser,
    PlainText,
    Reasoning,
    Withdrawn,
    gather,
)

ROLE = b'{"role":"assistant","content":""}'
NOTHING = b"{}"


class Speech:
    """One text's. It goes into `pieces` bit by bit, or into `message` whole."""

    def __init__(self, parser: Parser) -> None:
        self._parser, self._plain = parser, isinstance(parser, PlainText)
        self._calls: set[int] = set()

    def pieces(self, new: str, last: bool) -> list[bytes]:
        """Deltas, as JSON."""
        if self._plain:
            return [b'{"content":%b}' % to_json(new)] if new else []
        return [piece for event in self._events(new, last) for piece in _delta(event)]

    def message(self, whole: str) -> dict[str, Any]:
        return _message(gather(self._events(whole, True)))

    def finish(self, text: Text) -> tuple[str | None, str | int | None]:
        """Why it ended: for its calls where it made any."""
        called = text.finish == "stop" and self._calls
        return "tool_calls" if called else text.finish, text.stop_reason

    def _events(self, new: str, last: bool) -> list[Event]:
        events = self._parser.feed(new)
        events += self._parser.finish() if last else []
        for event in events:
            if isinstance(event, CallStart):
                self._calls.add(event.index)
            elif isinstance(event, Withdrawn):
                self._calls.discard(event.index)
        return events


def _delta(event: Event) -> Iterator[bytes]:
    match event:
        case Content(text):
            yield b'{"content":%b}' % to_json(text)
        case Reasoning(text):
            said = to_json(text)
            yield b'{"reasoning_content":%b,"reasoning":%b}' % (said, said)
        case CallStart(index, id, name):
            call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
            yield to_json({"tool_calls": [call]})
        case Arguments(index, text):
            yield to_json({"tool_calls": [{"index": index, "function": {"arguments": text}}]})


def _message(said: Message) -> dict[str, Any]:
    content = None if said.calls and not said.content else said.content
    found: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if said.reasoning:
        found |= {"reasoning_content": said.reasoning, "reasoning": said.reasoning}
    if said.calls:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in said.calls
        ]
    return found
