"""What one rendering of a stranger's template may spend: steps, seconds, and the sizes of the values that it makes.

A value weighs its characters and its items, those of shared parts as often as they are in it: what printing, comparing
or copying it costs. Values that a template builds are weighed when they are built, so none is ever beyond the limit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

MAX_OUTPUT_CHARS = 16_000_000
MAX_ITEMS = 1_000_000  # of one list
MAX_MADE = 1 << 28  # characters of all values that are made, an item being eight
MAX_STEPS = 2_000_000  # a conversation of 10 000 messages takes a tenth of it
MAX_SECONDS = 2.0
MAX_DEPTH = 100
MAX_BITS = 100_000  # of an integer
MAX_WIDTH = 1000

_CONTAINERS = (list, tuple, set, frozenset, dict)
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_WIDE_FIELD = re.compile(r"\d{4,}|%[^a-zA-Z%]*\*|\{[^{}]*\{")


class _Budget:
    """Steps, seconds and characters left to one rendering, and the weights of the values that it has."""

    def __init__(self) -> None:
        self._steps = self._made = 0
        self._deadline = time.monotonic() + MAX_SECONDS
        self.weights: dict[int, tuple[object, int]] = {}  # with the value, so that its id stays its own

    def step(self) -> str:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} loop turns and calls")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"more than {MAX_SECONDS:g} seconds")
        return ""

    def made(self, value: Any) -> Any:
        """The value, weighed and paid for."""
        weigh(value)
        self._made += len(value) if isinstance(value, str) else 8 * len(value) if isinstance(value, _CONTAINERS) else 0
        if self._made > MAX_MADE:
            raise SecurityError(f"values of more than {MAX_MADE} characters in all")
        return value


_budget: ContextVar[_Budget] = ContextVar("template_budget")


@contextmanager
def budget() -> Iterator[None]:
    """Bounds the rendering inside; each rendering has its own."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def step() -> str:
    return _budget.get().step()


def made(value: Any) -> Any:
    return _budget.get().made(value)


def weigh(value: Any, depth: int = 0) -> int:
    """Raises SecurityError for what is too heavy, or would be when printed."""
    if isinstance(value, str):
        return check_length(len(value)) + 1
    if isinstance(value, int):
        check_bits(value.bit_length())
    if isinstance(value, Namespace):
        raise SecurityError("a namespace within a value, or printed")
    if not isinstance(value, (*_CONTAINERS, *_VIEWS)):
        return 1
    known = _budget.get().weights.get(id(value))
    if known is not None and known[0] is value:
        return known[1]
    weight = check_length(1 + _inside(value, depth))
    _budget.get().weights[id(value)] = (value, weight)
    return weight


def _inside(value: Any, depth: int) -> int:
    if depth > MAX_DEPTH:
        raise SecurityError(f"a value nested deeper than {MAX_DEPTH}")
    if len(value) > MAX_ITEMS:
        raise SecurityError(f"{len(value)} items, at most {MAX_ITEMS}")
    total = 0
    for item in value.items() if isinstance(value, Mapping) else value:
        # The pairs of a dictionary are made anew each time, so they are not remembered.
        pair = isinstance(item, tuple) and isinstance(value, (Mapping, _VIEWS[2]))
        total = check_length(total + (sum(weigh(x, depth + 1) for x in item) if pair else weigh(item, depth + 1)))
    return total


def depth_of(value: Any) -> int:
    """Of lists and objects within each other; of a value that has been weighed."""
    levels, level = 0, [value]
    while level := [x for x in level if isinstance(x, _CONTAINERS)]:
        levels, level = levels + 1, [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
    return levels


def check_length(length: int) -> int:
    if length > MAX_OUTPUT_CHARS:
        raise SecurityError(f"a value of {length} characters or items, at most {MAX_OUTPUT_CHARS}")
    return length


def check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise SecurityError(f"an integer of {bits} bits, at most {MAX_BITS}")


def check_width(value: object) -> None:
    """A number or a text that says how much to pad, repeat or take away."""
    size = len(value) if isinstance(value, str) else value if isinstance(value, int) else 0
    if size > MAX_WIDTH:
        raise SecurityError(f"a width of {size}, at most {MAX_WIDTH}")


def check_sum(left: Any, right: Any) -> None:
    if hasattr(left, "__len__") and hasattr(right, "__len__"):
        check_length(len(left) + len(right))


def check_product(left: Any, right: Any) -> None:
    for value, count in ((left, right), (right, left)):
        if hasattr(value, "__len__") and isinstance(count, int):
            check_length(len(value) * max(count, 0))
    if isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() + right.bit_length())


def check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        check_bits(left.bit_length() * max(right, 0))


def check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        check_length(len(text) + text.count(old) * len(new))


def check_format(text: str, mark: str, values: Any) -> None:
    """`mark` begins a field; any field may be any of the values."""
    if _WIDE_FIELD.search(text):
        raise SecurityError(f"a format with a wide or computed field: {text[:40]!r}")
    parts = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else (values,)
    check_length(len(text) + text.count(mark) * max(map(weigh, parts), default=0))
