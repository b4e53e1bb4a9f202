"""Messages to the text that a chat model was trained on, by the template of its own directory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError

from penstock.errors import PromptError, TokenizerError
from penstock.text.files import ADDITIONAL_TEMPLATES, read_json, read_text, special_tokens
from penstock.text.limits import budget
from penstock.text.sandbox import RefusedByTemplate, TemplateEnvironment, check_template, render_bounded

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

DEFAULT = "default"
WITH_TOOLS = "tool_use"
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})
# What evaluating a stranger's expression may raise; memory and interrupts pass through.
_FAULTS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class ChatTemplate:
    """A model's chat template, in a sandbox: no access to Python, bounded steps, time and output.

    Two templates may be there: `tool_use` serves when tools are given, `default` otherwise.
    """

    def __init__(self, templates: str | Mapping[str, str], special: Mapping[str, str] | None = None) -> None:
        """`templates`: one source, or several by name; `special`: bos_token, eos_token, ... as the template sees them.

        Raises TokenizerError when a source is not a template.
        """
        self._sources = {DEFAULT: templates} if isinstance(templates, str) else dict(templates)
        self._special = dict(special or {})
        self._compiled = {name: _compile(name, source) for name, source in self._sources.items()}

    @classmethod
    def from_dir(cls, path: str | Path) -> ChatTemplate | None:
        """The template of a Hugging Face or engine directory; None when it has none (a base model).

        chat_template.jinja is read first, then chat_template.json, then tokenizer_config.json.
        Raises TokenizerError when there is one but it cannot be used.
        """
        directory = Path(path)
        sources = _sources(directory)
        return cls(sources, special_tokens(directory)) if sources else None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._sources)

    def source(self, with_tools: bool = False) -> str:
        """The template that `render` would take."""
        return self._sources.get(WITH_TOOLS if with_tools else DEFAULT) or self._sources.get(DEFAULT, "")

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Tool] | None = None,
        *,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt as text. Encode it with `add_special_tokens=False`: the template writes them itself.

        `template` picks one by name; `variables` reach the template as they are (`enable_thinking`, `documents`).
        Raises PromptError for messages that are malformed or that the template refuses, TokenizerError when the
        template fails or passes a limit.
        """
        _check_messages(messages)
        if clash := sorted(_RESERVED & variables.keys()):
            raise PromptError(f"the template variable {clash[0]!r} is set by the server; use another name")
        name = template if template is not None else self._choose(tools)
        if name not in self._compiled:
            raise PromptError(f"no chat template is named {name!r}; there are {', '.join(self.names)}")
        # Copied, so that not even a bug of the sandbox could change the caller's messages.
        own = {"messages": copy.deepcopy(list(messages)), "tools": None if tools is None else list(tools)}
        context = self._special | variables | own | {"add_generation_prompt": add_generation_prompt}
        return _render(name, self._compiled[name], context)

    def _choose(self, tools: Sequence[Tool] | None) -> str:
        return WITH_TOOLS if tools is not None and WITH_TOOLS in self._compiled else DEFAULT


def _sources(directory: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "chat_template.json"):
        found |= _declared(directory / name)
    if (main := directory / "chat_template.jinja").is_file():
        found[DEFAULT] = read_text(main)
    found |= {path.stem: read_text(path) for path in sorted((directory / ADDITIONAL_TEMPLATES).glob("*.jinja"))}
    return found


def _declared(path: Path) -> dict[str, str]:
    value: Any = read_json(path).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    pairs = value.items() if isinstance(value, dict) else _pairs(path, value)
    found = dict(pairs)
    if not all(isinstance(part, str) for pair in found.items() for part in pair):
        raise TokenizerError(f"{path}: chat_template holds something that is not text; {_FORMS}")
    return found


_FORMS = "it must be a string, or a list of objects with `name` and `template`"


def _pairs(path: Path, value: object) -> list[tuple[Any, Any]]:
    if not isinstance(value, list) or not all(isinstance(v, dict) and {"name", "template"} <= v.keys() for v in value):
        raise TokenizerError(f"{path}: chat_template is a {type(value).__name__} of another form; {_FORMS}")
    return [(v["name"], v["template"]) for v in value]


@cache
def _environment() -> TemplateEnvironment:
    return TemplateEnvironment()


def _compile(name: str, source: str) -> Template:
    try:
        check_template(name, source)
        return _environment().from_string(source)
    except (TemplateError, RecursionError, SyntaxError) as error:
        raise TokenizerError(
            f"the chat template {name!r} cannot be compiled: {error}; mend it, or use plain prompts"
        ) from error


def _render(name: str, template: Template, context: dict[str, Any]) -> str:
    try:
        with budget():
            return render_bounded(template.generate(context))
    except RefusedByTemplate as error:
        raise PromptError(f"the model's chat template refuses these messages: {error}") from error
    except _FAULTS as error:
        raise TokenizerError(
            f"the chat template {name!r} failed: {type(error).__name__}: {error}; check the messages against it"
        ) from error


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise PromptError("messages must be a list of at least one object with `role` and `content`")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"messages[{index}] has no `role`; send an object with `role` and `content`")
