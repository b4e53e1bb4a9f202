"""One call as its JSON comes: the name as soon as it is certain, then the arguments piece by piece."""

from __future__ import annotations

import json
from collections.abc import Collection
from io import SEEK_END, StringIO
from typing import Any, Final

from penstock.serve.tools.json_object import ObjectScanner

# Models mix up what their template calls the arguments; an id is the server's to give.
_ARGUMENTS: Final = ("arguments", "parameters")
_KEYS: Final = frozenset({"name", "type", "id", *_ARGUMENTS})
_EMPTY: Final = "{}"


class CallReader:
    """Reads `{"name": ..., "arguments": {...}}`, or with `name` given the arguments alone.

    `name` is set when it is certain that this is a call of one of `names` and its arguments have begun. Arguments may
    be an object, one within a string, or left out; what comes before the name is held back. `broken`: it is no such
    call, or broke off; always found at the same character.
    """

    def __init__(self, names: Collection[str], name: str | None = None) -> None:
        self._scanner = ObjectScanner(_KEYS if name is None else None)
        self._names = names
        self._text = StringIO()
        self._sent = 0
        self._rest = ""  # arguments that are not a piece of the text
        self._bad = False
        self._whole = name is not None
        self._called = name  # before it is certain that it is called
        self.name = name

    @property
    def broken(self) -> bool:
        return self._bad or self._scanner.broken

    @property
    def done(self) -> bool:
        return self._scanner.done and not self._bad

    def read(self, text: str, begin: int) -> int:
        """Read on; where the call, or what there is of it, ends."""
        at = begin
        while at < len(text) and not (self._scanner.done or self.broken):
            end = self._scanner.scan(text, at)
            self._text.seek(0, SEEK_END)
            self._text.write(text[at:end])
            at = end
            if not self._whole:
                self._look()
        return at

    def take(self) -> str:
        """The arguments that have come since."""
        if self.name is None:
            return ""
        begin, end = self._extent()
        piece = self._slice(max(begin, self._sent), end)
        self._sent = end
        rest, self._rest = self._rest, ""
        return piece + rest

    def _extent(self) -> tuple[int, int]:
        """Of the arguments' object, as far as it is there."""
        if self._whole:
            return 0, self._scanner.length
        key = next((k for k in _ARGUMENTS if k in self._scanner.spans), None)
        if key is None:
            return 0, 0
        begin, end = self._scanner.spans[key]
        if self._slice(begin, begin + 1) != "{":
            return 0, 0
        return begin, self._scanner.length if end is None else end

    def _slice(self, begin: int, end: int) -> str:
        self._text.seek(begin)
        return self._text.read(end - begin)

    def _look(self) -> None:
        if self._called is None:
            self._called = self._read_name()
        if self._scanner.done and not self._bad:
            self._close()
        if not self._bad and (self._scanner.done or self._extent()[1]):
            self.name = self._called

    def _read_name(self) -> str | None:
        name = self._member("name")
        self._bad = name is not None and not (isinstance(name, str) and name in self._names)
        return None if self._bad else name

    def _close(self) -> None:
        """The object has ended; see that there are a name and arguments."""
        given = [key for key in _ARGUMENTS if key in self._scanner.spans]
        if self._called is None or len(given) > 1:
            self._bad = True
        elif not self._extent()[1]:
            rest = _as_object(self._member(given[0]) if given else None)
            self._rest, self._bad = rest or "", rest is None

    def _member(self, key: str) -> Any:
        """The value of a member that has ended; None where it is none, or has not."""
        begin, end = self._scanner.spans.get(key, (0, None))
        return None if end is None else json.loads(self._slice(begin, end))


def _as_object(value: Any) -> str | None:
    """The arguments as text: of an object within a string, of none, or None where that is not what they are."""
    if value is None:
        return _EMPTY
    if not isinstance(value, str):
        return None
    scanner, text = ObjectScanner(), value.strip(" \t\r\n")
    end = scanner.scan(text)
    return text if scanner.done and end == len(text) else None
