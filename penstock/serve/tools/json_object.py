"""The end of a JSON object that comes in pieces, by one pass over its characters: no backtracking, no recursion."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, Literal

MAX_DEPTH: Final = 100
MAX_SCALAR: Final = 400  # characters of a number; a double needs 25, an exact one up to about 350

_SPACE: Final = frozenset(" \t\n\r")
_CLOSER: Final = {"{": "}", "[": "]"}
_STRING: Final = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR: Final = re.compile(r"[-+.0-9A-Za-z]*")
_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_FIRST: Final = frozenset("-0123456789tfn")
_WORDS: Final = frozenset({"true", "false", "null"})
_ESCAPED: Final = frozenset('"\\/bfnrt')
_HEX: Final = frozenset("0123456789abcdefABCDEF")

Want = Literal["value", "first key", "key", "colon", "first item", "next"]


class ObjectScanner:
    """Reads one object, strictly by RFC 8259; `spans` says where its own members' values lie, from its beginning.

    With `keys`, other keys than these, or one of them twice, are a fault.
    """

    def __init__(self, keys: frozenset[str] | None = None) -> None:
        self._keys = keys
        self._stack: list[str] = []  # the closers that are due
        self._want: Want = "value"
        self._inside: Callable[[str, int], int] | None = None  # of a string, an escape or a scalar
        self._is_key = self._is_own = False  # of the string within: a key; one of the object itself, to be known
        self._word = ""  # a scalar, or a key of its own, as far as it is read
        self._hex = 0  # digits of an escape that are due
        self._shift = 0  # from a place in the piece to one in the object
        self.length = 0
        self.spans: dict[str, tuple[int, int | None]] = {}
        self.done = self.broken = self._paused = False

    def scan(self, text: str, begin: int = 0) -> int:
        """Read on to the end of the piece, of one of its own members, or of the object; where that is. If `broken`,
        the first character that no object can have there."""
        at, self._shift, self._paused = begin, self.length - begin, False
        while at < len(text) and not (self.done or self.broken or self._paused):
            at = self._inside(text, at) if self._inside else self._structure(text, at)
        self.length = self._shift + at
        return at

    def _structure(self, text: str, at: int) -> int:
        char = text[at]
        if char in _SPACE:
            return at + 1
        match self._want:
            case "next" if char == ",":
                self._want = "key" if self._stack[-1] == "}" else "value"
                return at + 1
            case "next" | "first key" | "first item" if char == self._stack[-1]:
                self._want = "next"
                return self._close(at)
            case "key" | "first key" if char == '"':
                self._is_key, self._is_own = True, len(self._stack) == 1 and self._keys is not None
                self._word = ""
                return self._enter(self._string, at + 1)
            case "colon" if char == ":":
                self._want = "value"
                return at + 1
            case "value" | "first item":
                return self._value(char, at)
        return self._fault(at)

    def _value(self, char: str, at: int) -> int:
        if not self._stack and char != "{":
            return self._fault(at)
        if len(self._stack) == 1:
            self._open(at)
        self._want = "next"
        if char in _CLOSER and len(self._stack) < MAX_DEPTH:
            self._stack.append(_CLOSER[char])
            self._want = "first key" if char == "{" else "first item"
            return at + 1
        self._is_key = self._is_own = False
        self._word = ""
        if char == '"':
            return self._enter(self._string, at + 1)
        return self._enter(self._scalar, at) if char in _FIRST else self._fault(at)

    def _enter(self, inside: Callable[[str, int], int], at: int) -> int:
        self._inside = inside
        return at

    def _string(self, text: str, at: int) -> int:
        end = _run(_STRING, text, at)
        if self._is_own and not self._keep(text, at, end):
            return self._fault(at + MAX_SCALAR - len(self._word))
        if end == len(text):
            return end
        if text[end] == "\\" and not self._is_own:  # no known key has an escape
            return self._enter(self._escape, end + 1)
        return self._end_string(end) if text[end] == '"' else self._fault(end)

    def _end_string(self, at: int) -> int:
        self._inside = None
        if not self._is_key:
            return self._end_value(at + 1)
        self._want = "colon"
        known = not self._is_own or (self._keys is not None and self._word in self._keys - self.spans.keys())
        return at + 1 if known else self._fault(at)

    def _escape(self, text: str, at: int) -> int:
        if text[at] == "u":
            self._hex = 4
            return self._enter(self._digits, at + 1)
        return self._enter(self._string, at + 1) if text[at] in _ESCAPED else self._fault(at)

    def _digits(self, text: str, at: int) -> int:
        if text[at] not in _HEX:
            return self._fault(at)
        self._hex -= 1
        return self._enter(self._digits if self._hex else self._string, at + 1)

    def _scalar(self, text: str, at: int) -> int:
        end = _run(_SCALAR, text, at)
        if not self._keep(text, at, end):
            return self._fault(at + MAX_SCALAR - len(self._word))
        if end == len(text):
            return end
        self._inside = None
        good = self._word in _WORDS or _NUMBER.fullmatch(self._word)
        return self._end_value(end) if good else self._fault(end)

    def _keep(self, text: str, at: int, end: int) -> bool:
        """Whether the word has room for this."""
        if len(self._word) + end - at > MAX_SCALAR:
            return False
        self._word += text[at:end]
        return True

    def _close(self, at: int) -> int:
        self._stack.pop()
        self.done = not self._stack
        return self._end_value(at + 1)

    def _open(self, at: int) -> None:
        if self._keys is not None:
            self.spans[self._word] = (self._shift + at, None)
            self._member = self._word

    def _end_value(self, at: int) -> int:
        if len(self._stack) == 1 and self._keys is not None:
            self.spans[self._member] = (self.spans[self._member][0], self._shift + at)
            self._paused = True
        return at

    def _fault(self, at: int) -> int:
        self.broken = True
        return at


def _run(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at
