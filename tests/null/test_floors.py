"""The floors of the design: every import of the package, lazy and TYPE_CHECKING ones too, goes to a lower floor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# (floor, order within it). A module imports only what ranks strictly lower, or its own package; equal rank means
# independent. "" is penstock/__init__.py, which re-exports the public surface.
RANKS = {
    "errors": (0, 0),
    "version": (0, 0),
    "unsupported": (0, 1),
    "bundled": (0, 1),
    "plugins": (0, 1),
    "formats": (0, 2),
    "ir": (0, 3),
    "spec": (1, 0),
    "engine": (1, 1),
    "text": (1, 1),
    "grammar": (1, 2),
    "models": (2, 0),
    "kernels": (2, 0),
    "compiler": (3, 0),
    "runtime": (3, 0),
    "llm": (4, 0),
    "": (4, 1),
    "serve": (5, 0),
    "bench": (5, 1),
    "cli": (6, 0),
    "__main__": (6, 1),
}
NOT_IN_CORE = {
    "aiohttp",
    "fastapi",
    "msgspec",
    "opentelemetry",
    "prometheus_client",
    "pydantic",
    "rich",
    "starlette",
    "transformers",
    "typer",
    "uvicorn",
    "xgrammar",
}
# Optional, and imported where output is held to a grammar, not before.
LAZY_IN_CORE = {"xgrammar": "grammar"}
CORE_FLOORS = range(5)
HEAVY = {"torch", "triton"}
LIGHT_FOLDERS = ("penstock/runtime/schedule/", "penstock/runtime/kv/", "penstock/spec/", "penstock/engine/")
LIGHT_FILES = {f"penstock/ir/{name}.py" for name in ("graph", "op", "rewrite", "dialect")}
MAY_BE_HEAVY = {"penstock/runtime/kv/pool.py"}
# Besides penstock/kernels/**/*_triton.py.
MAY_IMPORT_TRITON = {"penstock/kernels/compile.py"}


@dataclass(frozen=True)
class Import:
    """One imported dotted name; `eager` if it runs when the module is imported."""

    name: str
    line: int
    eager: bool


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(node: ast.AST, eager: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, and whether it runs at import time."""
    for child in ast.iter_child_nodes(node):
        lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for part in child.body:
                yield part, False
                yield from _statements(part, False)
            for part in child.orelse:
                yield part, eager
                yield from _statements(part, eager)
            continue
        yield child, eager
        yield from _statements(child, eager and not lazy)


def _from_base(node: ast.ImportFrom, path: str) -> str:
    """The absolute dotted name that a `from ... import` starts at."""
    if not node.level:
        return node.module or ""
    package = path.removesuffix(".py").split("/")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _dynamic_name(node: ast.AST) -> str | None:
    """The literal argument of import_module("...") or __import__("...")."""
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func)
        if called.split(".")[-1] in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return node.args[0].value
    return None


def imports_of(path: str, source: str) -> list[Import]:
    """All imports of a source at the repository path `path`, as absolute dotted names."""
    found: list[Import] = []
    for node, eager in _statements(ast.parse(source), True):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, eager) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _from_base(node, path)
            found += [Import(f"{base}.{alias.name}", node.lineno, eager) for alias in node.names]
        elif (name := _dynamic_name(node)) is not None:
            assert isinstance(node, ast.Call)
            found.append(Import(name, node.lineno, eager))
    return found


def module_of(path: str) -> str:
    """The name of RANKS that a file belongs to: penstock/ir/graph.py -> ir, penstock/__init__.py -> ''."""
    top = path.split("/")[1].removesuffix(".py")
    return "" if top == "__init__" else top


def _target(name: str) -> str:
    """The name of RANKS that an import of penstock.* reaches; a name that is no module is the root's own."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANKS else ""


def _floor_breach(path: str, imported: Import) -> str | None:
    own, target = module_of(path), _target(imported.name)
    # "from penstock import x" of an unknown x is either the root's own name or a new module: both are refused below.
    if target == own or RANKS[target] < RANKS[own]:
        return None
    return f"{own or '__init__'} (floor {RANKS[own]}) imports {imported.name} (floor {RANKS[target]})"


def _foreign_breach(path: str, imported: Import) -> str | None:
    top = imported.name.split(".")[0]
    lazily = LAZY_IN_CORE.get(top) == module_of(path) and not imported.eager
    if top in NOT_IN_CORE and not lazily and RANKS[module_of(path)][0] in CORE_FLOORS:
        return f"the core may not import {top}"
    light = path.startswith(LIGHT_FOLDERS) or path in LIGHT_FILES
    if top in HEAVY and imported.eager and light and path not in MAY_BE_HEAVY:
        return f"{top} at module level"
    is_kernel = path.startswith("penstock/kernels/") and path.endswith("_triton.py")
    if top == "triton" and not is_kernel and path not in MAY_IMPORT_TRITON:
        return "triton belongs in penstock/kernels/**/*_triton.py"
    return None


def breaches(path: str, source: str) -> list[str]:
    """One line per breach of the floors in this source."""
    if module_of(path) not in RANKS:
        return [f"{path}: a new top-level module; give it a floor in RANKS"]
    check = {True: _floor_breach, False: _foreign_breach}
    found = ((i, check[i.name.split(".")[0] == "penstock"](path, i)) for i in imports_of(path, source))
    return [f"{path}:{imported.line}: {why}" for imported, why in found if why]


def test_every_import_goes_down() -> None:
    files = sorted((ROOT / "penstock").rglob("*.py"))
    assert files
    found = [
        line
        for path in files
        if "bundled" not in path.relative_to(ROOT).parts[2:-1]
        for line in breaches(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


PLANTED = [
    ("penstock/ir/graph.py", "from penstock.spec import ModelSpec"),
    ("penstock/ir/graph.py", "from ..spec import ModelSpec"),
    ("penstock/ir/graph.py", "def f():\n    import penstock.llm"),
    ("penstock/ir/graph.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from penstock import engine"),
    ("penstock/ir/ops/norm.py", "from ... import kernels"),
    ("penstock/ir/graph.py", "import torch"),
    ("penstock/ir/rewrite.py", "try:\n    import torch\nexcept ImportError:\n    pass"),
    ("penstock/errors.py", "from penstock.formats import BF16"),
    ("penstock/formats/int4.py", "from penstock.ir import graph"),
    ("penstock/spec/model.py", "import penstock.engine"),
    ("penstock/text/chat.py", "from penstock.engine import Engine"),
    ("penstock/models/decoder.py", "from penstock.kernels import tactic"),
    ("penstock/kernels/tactic.py", "from penstock.models import decoder"),
    ("penstock/compiler/build.py", "from penstock.runtime import step"),
    ("penstock/runtime/step.py", "from penstock.compiler import build"),
    ("penstock/runtime/step.py", "import importlib\nimportlib.import_module('penstock.compiler')"),
    ("penstock/runtime/step.py", "from penstock import LLM"),
    ("penstock/llm.py", "import penstock.cli"),
    ("penstock/llm.py", "def f():\n    from rich.progress import Progress"),
    ("penstock/models/hub.py", "import transformers"),
    ("penstock/runtime/schedule/policy.py", "import torch.nn"),
    ("penstock/runtime/kv/blocks.py", "class A:\n    import torch"),
    ("penstock/compiler/select.py", "def f():\n    import triton"),
    ("penstock/kernels/launch.py", "import triton.language as tl"),
    ("penstock/newthing.py", "x = 1"),
]
ALLOWED = [
    ("penstock/runtime/kv/pool.py", "import torch"),
    ("penstock/runtime/kv/blocks.py", "def f():\n    import torch"),
    ("penstock/spec/model.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ("penstock/kernels/norm/rms_triton.py", "import triton"),
    ("penstock/kernels/compile.py", "import triton"),
    ("penstock/llm.py", "from penstock.compiler import build\nfrom penstock.runtime import executor"),
    ("penstock/ir/ops/norm.py", "from ..graph import Value\nfrom ...formats import BF16"),
    ("penstock/serve/app.py", "import fastapi\nfrom penstock import LLM"),
    ("penstock/cli.py", "import typer\nfrom . import llm"),
    ("penstock/__init__.py", "def __getattr__(name):\n    from penstock.llm import LLM\n    return LLM"),
]


@pytest.mark.parametrize(("path", "source"), PLANTED)
def test_a_planted_breach_is_found(path: str, source: str) -> None:
    assert breaches(path, source)


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_what_the_floors_allow_passes(path: str, source: str) -> None:
    assert breaches(path, source) == []
