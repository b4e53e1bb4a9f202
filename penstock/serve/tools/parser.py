"""Tool calls out of a model's text as it comes, in the three ways that models were trained to write them.

A call is told as soon as it is certain: its markers have come, its name is one of the tools', its arguments have begun.
What turns out to be none is given back as content. White space beside a call is its wrapping, and not content.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Collection
from typing import ClassVar, Final, Literal

from penstock.serve.tools.call import CallReader
from penstock.serve.tools.events import Arguments, CallStart, Content, Event, Reader, Withdrawn, append
from penstock.text.detokenize import overlap

SPACE: Final = " \t\r\n"

_ID: Final = string.ascii_letters + string.digits

StyleName = Literal["llama3_json", "hermes", "mistral"]


class ToolParser(Reader):
    """What all styles share: content until a marker, then one object or several."""

    begin: ClassVar[str]  # opens calls
    end: ClassVar[str] = ""  # closes them
    between: ClassVar[str] = ""  # the character between two calls

    def __init__(self, names: Collection[str], new_id: Callable[[], str] | None = None) -> None:
        """`names`: of the tools; a call of another is content."""
        self._names = frozenset(names)
        self._new_id = new_id or self._make_id
        self._markers = [marker for marker in (self.begin, self.end) if marker]
        self._search = re.compile("|".join(map(re.escape, self._markers))).search
        super().__init__(self._in_text)
        self._raw: list[str] = []  # of what may become a call
        self._call: CallReader | None = None
        self._started = False
        self._next = 0
        self._beside_call = False
        self.calls = 0

    def _make_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def finish(self) -> list[Event]:
        if self._raw:
            self._give_back()
        self._content(self._held)
        if not self._beside_call:
            self._emit(Content("".join(self._space)))
        return self._take()

    def _emit(self, event: Event) -> None:
        if not isinstance(event, Content) or event.text:
            append(self._events, event)

    def _content(self, text: str) -> None:
        if body := text.rstrip(SPACE):
            self._emit(Content(body.lstrip(SPACE) if self._beside_call else "".join(self._space) + body))
            self._space, self._beside_call = [], False
        self._space.append(text[len(body) :])

    def _in_text(self, text: str, at: int) -> int:
        if found := self._search(text, at):
            self._content(text[at : found.start()])
            self._marker(found.group())
            return found.end()
        keep = max(overlap(text, marker, at) for marker in self._markers)
        self._content(text[at : len(text) - keep])
        self._held = text[len(text) - keep :]
        return len(text)

    def _marker(self, marker: str) -> None:
        if marker == self.begin:
            self._raw, self._state = [marker], self._opened
        elif not self._beside_call:
            self._content(marker)

    def _opened(self, text: str, at: int) -> int:
        """A call is due."""
        if text[at] in SPACE:
            return self._keep(text, at)
        if text[at] != "{":
            return self._give_back(at)
        self._object()
        return at

    def _keep(self, text: str, at: int) -> int:
        self._raw.append(text[at])
        return at + 1

    def _object(self, name: str | None = None) -> None:
        self._call, self._state = CallReader(self._names, name), self._in_call

    def _in_call(self, text: str, at: int) -> int:
        call = self._call
        assert call is not None
        end = call.read(text, at)
        self._raw.append(text[at:end])
        if call.name is not None:
            self._tell(call, call.name)
        if call.broken:
            return self._give_back(end)
        if call.done:
            self._called()
        return end

    def _tell(self, call: CallReader, name: str) -> None:
        if not self._started:
            self._started = True
            self._emit(CallStart(self._next, self._new_id(), name))
        if piece := call.take():
            self._emit(Arguments(self._next, piece))

    def _called(self) -> None:
        self.calls += 1
        self._next += 1
        self._raw, self._space = [], []
        self._call, self._started, self._beside_call = None, False, True
        self._state = self._behind

    def _behind(self, text: str, at: int) -> int:
        """One call has been."""
        if not self.between:
            self._state = self._in_text
        elif text[at] in SPACE:
            return self._keep(text, at)
        elif text[at] == self.between:
            self._state = self._opened
            return self._keep(text, at)
        elif text[at] == "{":
            self._object()
        else:
            self._give_back(at)
        return at

    def _give_back(self, at: int = 0) -> int:
        raw, self._raw = "".join(self._raw), []
        if self._started:
            raw = raw if self._beside_call else "".join(self._space) + raw
            self._emit(Withdrawn(self._next, raw))
            self._next += 1
            self._space, self._beside_call = [], False
        else:
            self._content(raw)
        self._call, self._started, self._state = None, False, self._in_text
        return at


class HermesParser(ToolParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one for each call: Hermes, Qwen 2.5 and 3."""

    begin, end = "<tool_call>", "</tool_call>"


class Llama3Parser(ToolParser):
    """`{"name": ..., "parameters": {...}}`, several separated by `;`, as the whole text or behind `<|python_tag|>`."""

    begin, between = "<|python_tag|>", ";"

    def __init__(self, names: Collection[str], new_id: Callable[[], str] | None = None) -> None:
        super().__init__(names, new_id)
        self._state = self._first

    def _first(self, text: str, at: int) -> int:
        if text[at] in SPACE:
            self._space.append(text[at])
            return at + 1
        if text[at] == "{":
            self._object()
        else:
            self._state = self._in_text
        return at


_HEADER: Final = re.compile(r"([^\s\[\]{}]+)\s*(\[CALL_ID\]\s*\w+\s*)?(\[ARGS\])?\s*")
_MAX_HEADER: Final = 256


class MistralParser(ToolParser):
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`, or `[TOOL_CALLS]name[ARGS]{...}`, also without `[ARGS]`
    and with a `[CALL_ID]`, once for each call. Its templates want ids of nine letters and digits."""

    begin, between = "[TOOL_CALLS]", ","

    def __init__(self, names: Collection[str], new_id: Callable[[], str] | None = None) -> None:
        super().__init__(names, new_id)
        self._in_list = False
        self._header = ""  # what stands in front of arguments

    def _make_id(self) -> str:
        return "".join(secrets.choice(_ID) for _ in range(9))

    def _marker(self, marker: str) -> None:
        super()._marker(marker)
        self._in_list = False

    def _opened(self, text: str, at: int) -> int:
        if text[at] == "[" and not self._in_list:
            self._in_list = True
            return self._keep(text, at)
        if self._in_list or text[at] == "{" or text[at] in SPACE:
            return super()._opened(text, at)
        self._header, self._state = "", self._named
        return at

    def _named(self, text: str, at: int) -> int:
        if text[at] != "{":
            self._header += text[at]
            return self._keep(text, at) if len(self._header) <= _MAX_HEADER else self._give_back(at)
        found = _HEADER.fullmatch(self._header)
        if found is None or found.group(1) not in self._names:
            return self._give_back(at)
        self._object(found.group(1))
        return at

    def _behind(self, text: str, at: int) -> int:
        if not self._in_list:
            self._state = self._in_text
            return at
        if text[at] == "]":
            self._raw, self._state = [], self._in_text
            return at + 1
        return super()._behind(text, at)


STYLES: Final[dict[StyleName, type[ToolParser]]] = {
    "llama3_json": Llama3Parser,
    "hermes": HermesParser,
    "mistral": MistralParser,
}
