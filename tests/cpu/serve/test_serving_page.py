"""docs/serving.md says what is so: its samples run against one server, its tables are the code's."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BeforeValidator

from penstock.cli.serve import serve
from penstock.serve import errors, monitor
from penstock.serve.body import Body, parse
from penstock.serve.config import ServeConfig
from penstock.serve.routes import ROUTES
from penstock.serve.schema.base import Labels, StreamOptions
from penstock.serve.schema.chat import ChatRequest, Message
from penstock.serve.schema.completions import CompletionRequest
from penstock.serve.schema.embeddings import EmbeddingRequest
from tests.cpu.serve.doubles import StillEngine
from tests.cpu.serve.test_serve_cli import ROOT, started

PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")
CODE = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
CURLS = re.findall(r"^curl .*$", PAGE, re.MULTILINE)
AT = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, said = started(tmp_path_factory.mktemp("served"), "--tool_call_parser", "hermes")
    assert process.stdout is not None
    with process.stdout:
        ready = process.stdout.readline()
        assert ready, said
        yield ready.split()[3]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_its_python_prints_what_it_says(url: str) -> None:
    code = CODE.replace(AT, url)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^ *print\(.*\)  # prints (.*)$", CODE, re.MULTILINE)
    assert done.stdout.splitlines() == said and len(said) == CODE.count("print(") > 7


def test_its_commands_are_answered(url: str) -> None:
    assert len(CURLS) == 4
    for line in CURLS:
        words = [word.replace(AT, url) for word in shlex.split(line)]
        told = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
        if "/v1/embeddings" in line:  # of another server, with the same fields
            assert told["error"]["code"] == "unsupported" and "--task embed" in told["error"]["message"]
            assert parse(words[-1].encode(), EmbeddingRequest).dimensions == 64
        else:
            assert "error" not in told, line


def cells(heading: str, column: int = 0) -> list[str]:
    """Of the first table behind a heading."""
    table = re.findall(r"(?:^\|.*\n)+", PAGE[PAGE.index(heading) :], re.MULTILINE)[0]
    return [line.split(" | ")[column].strip("| ") for line in table.splitlines()[2:]]


def names(heading: str) -> set[str]:
    found = [name for cell in cells(heading) for name in re.findall(r"`([^`]+)`", cell)]
    assert len(found) == len(set(found))
    return set(found)


def refusals(model: type[Body]) -> dict[str, Mapping[str, Any]]:
    """What `refused` was told, by field."""
    made = {
        name: inspect.getclosurevars(each.func).nonlocals
        for name, field in model.model_fields.items()
        for each in field.metadata
        if isinstance(each, BeforeValidator) and "refused." in each.func.__qualname__
    }
    return {name: made[name] for name in sorted(made)}


def taken(model: type[Body]) -> set[str]:
    """All that has a meaning, and what is taken without effect."""
    return model.model_fields.keys() - (refusals(model).keys() - Labels.model_fields.keys())


def test_every_field_has_its_words() -> None:
    chats, texts = taken(ChatRequest), taken(CompletionRequest)
    assert names("**Completions and chats**") == chats & texts
    assert names("**Chats alone**") == chats - texts
    assert names("**Completions alone**") == texts - chats
    assert names("**Embeddings**") == taken(EmbeddingRequest)


def refused_table() -> str:
    rows = ["| field | of | taken | what to do |", "| --- | --- | --- | --- |"]
    chats, texts = refusals(ChatRequest), refusals(CompletionRequest)
    kinds = [("both", texts), ("chats", {name: told for name, told in chats.items() if name not in texts}),
             ("messages", refusals(Message)), ("`stream_options`", refusals(StreamOptions))]  # fmt: skip
    for kind, found in kinds:
        for name, told in found.items():
            taken = ", ".join(f"`{json.dumps(each)}`" for _, each in told["known"])
            rows.append(f"| `{name}` | {kind} | {taken} | {told['remedy']} |")
    return "\n".join(rows)


def test_what_is_refused_is_the_codes() -> None:
    assert f"\n\n{refused_table()}\n\n" in PAGE, f"docs/serving.md has to hold:\n{refused_table()}"


def test_every_endpoint_has_its_row() -> None:
    watched = monitor.Monitor(ServeConfig(), StillEngine())
    made = {f"{each.method} {each.path.replace(':path', '')}" for each in (*ROUTES, *watched.routes)}
    assert names("## Endpoints") == made


def raised(path: Path) -> Iterator[tuple[str, str]]:
    """Status and code of every RequestError in a file, and of what the protocol answers by itself."""
    for call in (each for each in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(each, ast.Call)):
        status, of = call.args[0] if call.args else None, ast.unparse(call.func)
        if of in ("RequestError", "self._end") and isinstance(status, ast.Constant):
            code = call.args[2] if len(call.args) > 2 else ast.Constant("")
            if isinstance(code, ast.Constant):
                yield str(status.value), str(code.value or "")
            else:
                assert path.name == "errors.py", "a code is a word where it is raised, or stands in errors.CODES"


def test_every_error_has_its_row() -> None:
    found = {pair for path in (ROOT / "penstock" / "serve").rglob("*.py") for pair in raised(path)}
    found |= {(str(row.status), row.code or "") for row in errors.TABLE}
    found |= {("400", code) for code in errors.CODES.values()}
    kinds = {str(row.status): row.type for row in errors.TABLE}
    heading = "## Errors"
    rows = list(zip(cells(heading), cells(heading, 1), cells(heading, 2), strict=True))
    said = {(status, code.strip("`")) for status, code, _ in rows}
    assert said == found - {("404", ""), ("408", "")}  # of no request that is HTTP; told beside another
    for status, _, kind in rows:
        usual = errors.SERVER if status >= "500" else errors.INVALID
        assert kind.strip("`") == kinds.get(status, usual)


def test_every_flag_has_its_words() -> None:
    flags = {f"--{name}" for name in inspect.signature(serve).parameters if name != "model"}
    assert not flags - set(re.findall(r"--\w+", PAGE))
    asked = inspect.signature(serve).parameters
    for flag, value in re.findall(r"^\| `--(\w+)` \| (\d+)", PAGE, re.MULTILINE):
        assert float(value) in (asked[flag].default, asked[flag].default / 2**20)


def test_limits_are_the_codes() -> None:
    asked = inspect.signature(serve).parameters
    row = next(line for line in PAGE.splitlines() if line.startswith("| `--max_prompts`"))
    flags, numbers = re.findall(r"--(\w+)", row), re.findall(r"\d+", row.split(" | ")[1])
    assert [asked[flag].default for flag in flags] == [*map(int, numbers)]
