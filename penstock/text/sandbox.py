"""A Jinja environment for templates that strangers wrote: no attributes of Python, no writing, bounded work.

Beyond Jinja's own sandbox, every loop turn and macro call counts as a step, the clock is read every so many of them,
and an operation that would make a text or list longer than the limit is refused before it runs.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE_CHARS = 1_000_000
MAX_OUTPUT_CHARS = 16_000_000
MAX_STEPS = 200_000  # refused within about two seconds; a conversation of 10 000 messages takes a tenth of it
MAX_SECONDS = 2.0
_CLOCK_EVERY = 256

# str methods that make text of any length from a number.
_PADDING_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
_PADDING_FILTERS = ("batch", "center", "indent", "slice", "wordwrap")
_WIDE_FIELD = re.compile(r"\d{4,}|%[^a-zA-Z%]*\*|\{[^{}]*\{")


class RefusedByTemplate(TemplateError):
    """The template called raise_exception: these messages are not what it can render."""


class _Budget:
    """Steps and seconds left to one rendering."""

    def __init__(self) -> None:
        self._steps = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> str:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} loop turns and calls")
        if self._steps % _CLOCK_EVERY == 0 and time.monotonic() > self._deadline:
            raise SecurityError(f"more than {MAX_SECONDS:g} seconds")
        return ""


_budget: ContextVar[_Budget] = ContextVar("template_budget")


@contextmanager
def budget() -> Iterator[None]:
    """Bounds the rendering inside; each rendering has its own."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class _Instrument(NodeTransformer):
    """Counts a step at the head of every loop and macro body, and routes `~` through the length check."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("join_texts", nodes.List(node.nodes, lineno=node.lineno), lineno=node.lineno)

    def _counted(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("count_step", lineno=node.lineno), lineno=node.lineno))
        return node


def _call(method: str, *args: nodes.Expr, lineno: int) -> nodes.Call:
    attribute = nodes.EnvironmentAttribute(method, lineno=lineno)
    return nodes.Call(attribute, list(args), [], None, None, lineno=lineno)


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's words for training; when rendering, its body stands for itself."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The dialect of Hugging Face's chat templates, bounded."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # optimized=False: constants are not folded, since folding runs operations before any limit is in force.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[LoopControlExtension, _Generation]
        )
        for name in _PADDING_FILTERS:
            self.filters[name] = _narrow(name, self.filters[name])
        self.filters["format"] = lambda text, *args, **kwargs: self._percent(text, kwargs or args)
        self.filters["tojson"] = _to_json
        self.filters["replace"] = _replace
        self.filters["join"] = _bounded_join(self.filters["join"])
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)

    def count_step(self) -> str:
        return _budget.get().step()

    def join_texts(self, parts: list[object]) -> str:
        texts = [str(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, method = getattr(callee, "__self__", None), getattr(callee, "__name__", "")
        if isinstance(owner, str) and method == "replace" and len(args) > 1:
            _check_replace(owner, *args[:2])
        elif isinstance(owner, str) and method == "join" and args and hasattr(args[0], "__len__"):
            _check_length(len(owner) * len(args[0]))
        return super().call(context, callee, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_length(len(left) + len(right))
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            return self._percent(left, right)
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _PADDING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Jinja would print nothing; a template that tries is better stopped."""
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not safe")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Instrument().visit(super()._parse(source, name, filename))
        assert isinstance(tree, nodes.Template)
        return tree

    @staticmethod
    def _percent(text: str, values: Any) -> str:
        _check_format(str(text))
        return str(str(text) % values)


def _raise_exception(message: object) -> str:
    raise RefusedByTemplate(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face's, which unlike Jinja's own escapes nothing for HTML and keeps the order of keys."""
    if indent is not None:
        _check_width(indent)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _narrow(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pads, its numbers kept small; Jinja's marks (such as pass_environment) are kept too."""

    def bounded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int):
                _check_width(value)
        return original(*args, **kwargs)

    vars(bounded).update(vars(original))
    bounded.__name__ = name
    return bounded


def _replace(text: object, old: object, new: object, count: int | None = None) -> str:
    """Jinja's filter without its escaping, which is off here."""
    _check_replace(str(text), str(old), str(new))
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _bounded_join(original: Callable[..., Any]) -> Callable[..., Any]:
    def bounded(eval_ctx: nodes.EvalContext, value: Any, d: object = "", attribute: Any = None) -> Any:
        items = value if hasattr(value, "__len__") else list(value)
        _check_length(len(items) * len(str(d)))
        return original(eval_ctx, items, d, attribute)

    vars(bounded).update(vars(original))
    return bounded


def _check_replace(text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        _check_length(len(text) + text.count(old) * len(new))


def _check_width(width: int) -> None:
    if width > 1000:
        raise SecurityError(f"a width of {width}, at most 1000")


def _check_length(length: int) -> None:
    if length > MAX_OUTPUT_CHARS:
        raise SecurityError(f"a value of {length} characters or items, at most {MAX_OUTPUT_CHARS}")


def _check_product(left: Any, right: Any) -> None:
    for value, count in ((left, right), (right, left)):
        if hasattr(value, "__len__") and isinstance(count, int):
            _check_length(len(value) * max(count, 0))
    if isinstance(left, int) and isinstance(right, int):
        _check_length(left.bit_length() + right.bit_length())


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_length(left.bit_length() * max(right, 0) * 64)


def _check_format(text: str) -> None:
    if _WIDE_FIELD.search(text):
        raise SecurityError(f"a format with a wide or computed field: {text[:40]!r}")


def check_template(name: str, source: str) -> None:
    """Raises SecurityError when the source is too long to be compiled."""
    if len(source) > MAX_TEMPLATE_CHARS:
        raise SecurityError(f"template {name!r} has {len(source)} characters, at most {MAX_TEMPLATE_CHARS}")


def render_bounded(pieces: Iterator[str]) -> str:
    """Join what a template generates, up to the output limit."""
    parts: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        _check_length(length)
        parts.append(piece)
    return "".join(parts)
