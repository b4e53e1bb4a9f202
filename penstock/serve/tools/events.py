"""What a parser of a model's text says: pieces of content, of reasoning, and of tool calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """The next piece of a call's arguments, which are a JSON object as text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """Call `index` broke off, or is no JSON, after it had started: `text` is all that the model wrote for it. A whole
    response shows that as content instead; a stream has sent the beginning and leaves it."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class WasReasoning:
    """All content until here was reasoning: its end came without a beginning. A stream has sent it and leaves it."""


Event = Content | Reasoning | CallStart | Arguments | Withdrawn | WasReasoning


class Parser(Protocol):
    """A model's text to events. However the text is cut, the events are the same, but for where the pieces of content,
    reasoning and arguments are cut. Never raises for a text; takes time linear in its length."""

    def feed(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]:
        """What was held back. Nothing may be fed afterwards."""
        ...


class PlainText:
    """All text is content."""

    def feed(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []


@dataclass(slots=True)
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """A whole response. `content` and `reasoning` are "" where there is none."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


def gather(events: Iterable[Event]) -> Message:
    """All events of a text as a response that is not streamed has them: withdrawn calls are content there."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: dict[int, tuple[Call, list[str]]] = {}
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case CallStart(index, id, name):
                calls[index] = (Call(id, name), [])
            case Arguments(index, text):
                calls[index][1].append(text)
            case Withdrawn(index, text):
                del calls[index]
                content.append(text)
            case WasReasoning():
                reasoning, content = [*reasoning, "".join(content).strip()], []
    for call, pieces in calls.values():
        call.arguments = "".join(pieces)
    return Message("".join(content), "".join(reasoning), [call for call, _ in calls.values()])


class Reader:
    """The loop of a parser: a state reads on from a place in the piece and says how far it came; it always moves, or
    changes the state. What may be the beginning of a marker is held for the next piece."""

    def __init__(self, state: Callable[[str, int], int]) -> None:
        self._state = state
        self._events: list[Event] = []
        self._held = ""  # perhaps the beginning of a marker
        self._space: list[str] = []  # part of the text, unless a marker follows

    def feed(self, text: str) -> list[Event]:
        text, self._held = self._held + text, ""
        at = 0
        while at < len(text):
            at = self._state(text, at)
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def append(events: list[Event], event: Event) -> None:
    """To the list, joined with a last one of its kind."""
    last = events[-1] if events else None
    match last, event:
        case (Content(old), Content(new)):
            events[-1] = Content(old + new)
        case (Reasoning(old), Reasoning(new)):
            events[-1] = Reasoning(old + new)
        case (Arguments(index, old), Arguments(same, new)) if index == same:
            events[-1] = Arguments(index, old + new)
        case _:
            events.append(event)
