"""A Jinja environment for templates that strangers wrote: no attributes of Python, no writing, bounded work.

Beyond Jinja's own sandbox, every loop turn, call, filter, test, slice and comparison is a step that reads the clock;
an operation whose result would be too long is refused before it runs, and every result is weighed (see `limits`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from penstock.text import limits
from penstock.text.limits import check_length, check_width, made, step, weigh

MAX_TEMPLATE_CHARS = 100_000  # several times the longest published; the worst take seconds to compile

# Methods that make no text of any length from a number, and none of bytes.
_TEXT_METHODS = frozenset((
    "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip",
    "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
    "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
))  # fmt: skip
_STRIP = ("strip", "lstrip", "rstrip")
# Filters that take a text apart into its characters.
_ITERATING = frozenset((
    "list", "sort", "unique", "groupby", "batch", "slice", "min", "max", "map", "select", "reject", "selectattr",
    "rejectattr",
))  # fmt: skip
_NARROW = ("batch", "center", "round", "slice", "trim", "truncate")
# Quadratic in hostile texts, or another text each time; no published template has them.
_LEFT_OUT = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")


class RefusedByTemplate(TemplateError):
    """The template called raise_exception: these messages are not what it can render."""


class _Instrument(NodeTransformer):
    """Counts a step at the head of every loop and macro body; routes `~`, slices, literals and comparisons."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("join_texts", nodes.List(node.nodes, lineno=node.lineno), lineno=node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._weighed(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._weighed(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._weighed(node) if node.ctx == "load" else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("stepped", node.expr, lineno=node.lineno)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = (end or nodes.Const(None) for end in (node.arg.start, node.arg.stop, node.arg.step))
        return _call("take_slice", node.node, *ends, lineno=node.lineno)

    def _weighed(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _call("weighed", node, lineno=node.lineno)

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
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[LoopControlExtension, _Generation],
            finalize=_weighed,
        )
        for name in _LEFT_OUT:
            del self.filters[name]
        own: dict[str, Callable[..., Any]] = {
            "format": self._format,
            "tojson": _to_json,
            "replace": _replace,
            "indent": _indented(self.filters["indent"]),
        }
        narrow = {name: _narrow(self.filters[name]) for name in _NARROW}
        self.filters |= narrow | own | {"join": _joined(self.filters["join"]), "sum": _summed(self.filters["sum"])}
        filters: Any = self.filters
        tests: Any = self.tests
        self.filters = {name: _stepped(name, apply, results=True) for name, apply in filters.items()}
        self.tests = {name: _stepped(name, test, results=False) for name, test in tests.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def count_step(self) -> str:
        return step()

    def stepped(self, value: object) -> object:
        step()
        return value

    def weighed(self, value: object) -> object:
        step()
        return made(value)

    def take_slice(self, value: Any, start: Any, stop: Any, stride: Any) -> Any:
        step()
        return made(value[start:stop:stride])

    def join_texts(self, parts: list[object]) -> str:
        check_length(sum(map(weigh, parts)))
        return str(made("".join(map(str, parts))))

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, method = getattr(callee, "__self__", None), getattr(callee, "__name__", "")
        if owner is self:  # what the instruments call
            return callee(*args)
        step()
        if isinstance(owner, str):
            args = _checked_method(owner, method, args)
        result = super().call(context, callee, *args, **kwargs)
        return result if isinstance(result, Namespace) else made(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        step()
        if operator == "%" and isinstance(left, str):
            return self._percent(left, right)
        {"+": limits.check_sum, "*": limits.check_product, "**": limits.check_power}.get(operator, _pass)(left, right)
        return made(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in _TEXT_METHODS:
            return False
        return not isinstance(obj, int | float | bytes) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Jinja would print nothing; a template that tries is better stopped."""
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not safe")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            limits.check_format(value.__self__, "{", (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return checked

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Instrument().visit(super()._parse(source, name, filename))
        assert isinstance(tree, nodes.Template)
        return tree

    def _format(self, text: object, *args: Any, **kwargs: Any) -> str:
        return self._percent(str(text), kwargs or args)

    @staticmethod
    def _percent(text: str, values: Any) -> str:
        limits.check_format(str(text), "%", values)
        return str(made(str(text) % values))


def _weighed(value: Any) -> Any:
    """What is about to be printed, also where Jinja itself made it."""
    weigh(value)
    return value


def _pass(_left: object, _right: object) -> None: ...


def _checked_method(text: str, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A text method's arguments, with a generator to join made a list."""
    if method == "replace" and len(args) > 1:
        limits.check_replace(text, *args[:2])
    elif method in _STRIP and args:
        check_width(args[0])
    elif method == "join" and args:
        items = args[0] if isinstance(args[0], str) else list(args[0])
        check_length((len(items) if isinstance(items, str) else sum(map(weigh, items))) + len(text) * len(items))
        return (items,)
    return args


def _raise_exception(message: object) -> str:
    raise RefusedByTemplate(str(message))


def _strftime_now(form: object) -> str:
    check_width(form)
    limits.check_format(str(form), "%", ())
    return datetime.now().strftime(str(form))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face's, which unlike Jinja's own escapes nothing for HTML and keeps the order of keys."""
    weight = weigh(value)
    for width in (indent, *(separators or ())):
        check_width(width)
        size = len(width) if isinstance(width, str) else width or 0
        check_length(weight * size * limits.depth_of(value) if size > 1 else weight)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _stepped(name: str, original: Callable[..., Any], *, results: bool) -> Callable[..., Any]:
    """A filter or test as a step, a filter's result weighed; Jinja's marks (such as pass_environment) are kept."""
    iterates = results and name in _ITERATING

    @wraps(original)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        step()
        for value in (*args, *kwargs.values()):
            weigh(value)
        if iterates and any(isinstance(value, str) and len(value) > limits.MAX_ITEMS for value in args):
            raise SecurityError(f"a text of more than {limits.MAX_ITEMS} characters taken apart")
        result = original(*args, **kwargs)
        return made(result) if results else result

    return bounded


def _narrow(original: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numbers and texts, but for the first value, are kept small."""

    @wraps(original)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        for value in (*(a for a in args[1:] if isinstance(a, int | str)), *kwargs.values()):
            check_width(value)
        return original(*args, **kwargs)

    return bounded


def _replace(text: object, old: object, new: object, count: int | None = None) -> str:
    """Jinja's filter without its escaping, which is off here."""
    limits.check_replace(str(text), str(old), str(new))
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _indented(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def bounded(text: object, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
        check_width(width)
        size = len(width) if isinstance(width, str) else width
        check_length(len(str(text)) + (str(text).count("\n") + 2) * size)
        return original(str(text), width, first, blank)

    return bounded


def _joined(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def bounded(eval_ctx: nodes.EvalContext, value: Any, d: object = "", attribute: Any = None) -> Any:
        items = list(value) if attribute is None else list(map(make_attrgetter(eval_ctx.environment, attribute), value))
        check_length(sum(map(weigh, items)) + len(items) * len(str(d)))
        return str(d).join(map(str, items))

    return bounded


def _summed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of numbers alone: lists would be copied with each."""

    @wraps(original)
    def bounded(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
        if not isinstance(start, int | float):
            raise SecurityError(f"a sum that starts with a {type(start).__name__}")
        return original(environment, iterable, attribute, start)

    return bounded


def check_template(name: str, source: str) -> None:
    """Raises SecurityError when the source is too long to be compiled."""
    if len(source) > MAX_TEMPLATE_CHARS:
        raise SecurityError(f"template {name!r} has {len(source)} characters, at most {MAX_TEMPLATE_CHARS}")


def render_bounded(pieces: Iterator[str]) -> str:
    """Join what a template generates, up to the output limit."""
    parts: list[str] = []
    length = 0
    for piece in pieces:
        length = check_length(length + len(piece))
        parts.append(piece)
    return "".join(parts)
