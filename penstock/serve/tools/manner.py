"""How one model writes calls and thoughts, as its chat template tells, and what that means for a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from penstock.errors import OptionError
from penstock.serve.errors import RequestError
from penstock.serve.reasoning import CLOSE, OPEN, ReasoningParser, detect_reasoning
from penstock.serve.tools.events import Parser, PlainText
from penstock.serve.tools.grammar import structural_tag
from penstock.serve.tools.parser import STYLES, StyleName
from penstock.serve.tools.schema import Tools
from penstock.text import ChatTemplate, Tokenizer

TOOL_PARSERS: Final = ("auto", *STYLES, "none")
REASONING_PARSERS: Final = ("auto", "qwen3", "none")
_MARKERS: Final[dict[str, tuple[str, ...]]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3_json": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "none": (),
}


def detect_tools(template: str) -> StyleName | Literal["none"]:
    """What a chat template that is given tools says of calls.

    mistral: it writes `[TOOL_CALLS]`. hermes: `<tool_call>` around JSON with `arguments`, so not the tags `<function=`
    or `<arg_key>` that others have within. llama3_json: JSON with `"parameters"` and no marker, in a template with
    Llama's `<|python_tag|>` or `<|eot_id|>`.
    """
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        tagged = "<function=" in template or "<arg_key>" in template or "arguments" not in template
        return "none" if tagged else "hermes"
    llama = "<|python_tag|>" in template or "<|eot_id|>" in template
    return "llama3_json" if llama and '"parameters"' in template else "none"


@dataclass(frozen=True)
class Manner:
    """Of one model. tools: the style of its calls. reasoning: whether it thinks first. compact: whether Mistral's calls
    are `name[ARGS]{...}` and not a list."""

    tools: StyleName | Literal["none"]
    reasoning: bool
    compact: bool = False

    @classmethod
    def of(cls, template: ChatTemplate | None, tools: str = "auto", reasoning: str = "auto") -> Manner:
        """`tools`, `reasoning`: of TOOL_PARSERS and REASONING_PARSERS. Raises OptionError for others."""
        check_parsers(tools, reasoning)
        with_tools = template.source(with_tools=True) if template else ""
        plain = template.source() if template else ""
        style = detect_tools(with_tools) if tools == "auto" else tools
        thinks = detect_reasoning(plain) if reasoning == "auto" else reasoning
        return cls(style, thinks == "qwen3", "[ARGS]" in with_tools)  # type: ignore[arg-type]

    def shown(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The markers that are tokens: what `IncrementalDetokenizer` has to show although it leaves out others."""
        markers = (*_MARKERS[self.tools], *((OPEN, CLOSE) if self.reasoning else ()))
        ids = (tokenizer.token_to_id(marker) for marker in markers)
        return frozenset(each for each in ids if each is not None)

    def check(self, tools: Tools | None) -> None:
        """Raises RequestError where the model's way to write calls is not known, or cannot be strict."""
        if tools is not None and self.tools == "none":
            raise RequestError(
                400, "tools: the model's chat template has no way to write tool calls that is known here; leave tools "
                f"out, or start the server with --tool_call_parser {'|'.join(STYLES)}", "unsupported", "tools",
            )  # fmt: skip
        if tools is not None and self.tools == "mistral" and tools.strict and not tools.required:
            raise RequestError(
                400, "tools: strict arguments of Mistral's calls are built for calls that are required alone; leave "
                "strict out, or tool_choice='required'", "unsupported", "tools",
            )  # fmt: skip

    def parser(self, prompt: str, tools: Tools | None) -> Parser:
        """Of one text; `prompt`: as it was rendered."""
        make: Callable[[], Parser] = PlainText
        if tools is not None and self.tools != "none":
            style, names = STYLES[self.tools], tuple(tools.schemas)
            make = lambda: style(names)  # noqa: E731
        return ReasoningParser(prompt, make) if self.reasoning else make()

    def grammar(self, prompt: str, tools: Tools | None) -> str | None:
        """`GuidedDecoding.structural_tag` of the text where a call is required, or tools are strict."""
        if tools is None or not (tools.required or tools.strict) or self.tools == "none":
            return None
        return structural_tag(self.tools, tools, compact=self.compact, prompt=prompt if self.reasoning else None)


def check_parsers(tools: str, reasoning: str) -> None:
    """Raises OptionError."""
    for name, value, known in (
        ("tool_call_parser", tools, TOOL_PARSERS),
        ("reasoning_parser", reasoning, REASONING_PARSERS),
    ):
        if value not in known:
            raise OptionError(f"{name}={value[:40]!r} is not one of {', '.join(known)}")
