"""What a request says of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from penstock.grammar.schema import check_size
from penstock.serve.body import Body

MOST_TOOLS: Final = 128
MOST_CHARACTERS: Final = 1 << 18  # of all tools, as JSON
_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(Body):
    """`parameters`: a JSON schema of an object; left out, the function takes anything. `strict`: whether arguments are
    held to it, which those of a call that is required always are."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        if (kind := (self.parameters or _OBJECT).get("type", "object")) != "object":
            raise ValueError(f"parameters: type {str(kind)[:40]!r}, but arguments are an object; say 'object'")
        return self


class Tool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    name: Name


class NamedTool(Body):
    """The function that is to be called."""

    type: Literal["function"]
    function: FunctionName


@dataclass(frozen=True)
class Tools:
    """What a request asks for. `schemas`: of arguments, by function. `required`: of which of them a call has to come;
    none: of any or not at all. `parallel`: whether there may be several. `plain`: as templates read them. `strict`:
    whose arguments are held to their schemas where no call is required."""

    schemas: Mapping[str, Mapping[str, Any]]
    required: tuple[str, ...]
    parallel: bool
    plain: list[dict[str, Any]]
    strict: frozenset[str] = frozenset()


class Tooled(Body):
    """The fields of a request that may have tools."""

    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _of_its_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"tools: two are named {twice!r}; give each a name of its own")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice asks for a call, and there are no tools; give tools, or leave it out")
        if isinstance(self.tool_choice, NamedTool) and (name := self.tool_choice.function.name) not in names:
            raise ValueError(f"tool_choice: there is no tool {name!r}; there are {', '.join(names[:10])}")
        check_size([tool.function.parameters for tool in self.tools or ()])  # before anything that would go deep
        if (size := len(json.dumps(self._plain(), allow_nan=False))) > MOST_CHARACTERS:
            raise ValueError(f"tools: {size} characters of JSON, at most {MOST_CHARACTERS}; say less")
        return self

    def asked_tools(self) -> Tools | None:
        """None where none is to be called: then the model is not told of any."""
        if not self.tools or self.tool_choice == "none":
            return None
        schemas = {tool.function.name: tool.function.parameters or _OBJECT for tool in self.tools}
        choice = self.tool_choice
        named = (choice.function.name,) if isinstance(choice, NamedTool) else ()
        return Tools(
            schemas,
            tuple(schemas) if choice == "required" else named,
            self.parallel_tool_calls is not False and not named,
            self._plain(),
            frozenset(tool.function.name for tool in self.tools if tool.function.strict),
        )

    def _plain(self) -> list[dict[str, Any]]:
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
