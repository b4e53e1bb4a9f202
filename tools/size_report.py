"""Report the size of the package, and fail when it outgrows its limits.

Prints lines per top-level folder of penstock/, files over 300 lines, functions over 45, and the median function. Exits
with 1 when the total passes [tool.penstock] max_lines, a file passes 400 lines, or a function passes 60 (a kernel,
which the compiler wants in one piece: 80).
"""

from __future__ import annotations

import ast
import statistics
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPORT_FILE, MAX_FILE = 300, 400
REPORT_FUNCTION, MAX_FUNCTION, MAX_KERNEL = 45, 60, 80


@dataclass(frozen=True)
class Sized:
    """A file or function, and its length in lines."""

    name: str
    lines: int


@dataclass(frozen=True)
class Report:
    """What was measured; `folders` counts lines by the first name below the package."""

    folders: dict[str, int]
    files: tuple[Sized, ...]
    functions: tuple[Sized, ...]

    @property
    def total(self) -> int:
        return sum(self.folders.values())


def functions_of(name: str, source: str) -> Iterator[Sized]:
    """Every function and method of a source, from its def line (decorators left out) to its last line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield Sized(f"{name}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1)


def measure(root: Path) -> Report:
    """Measure every Python file below `root`."""
    folders: Counter[str] = Counter()
    files: list[Sized] = []
    functions: list[Sized] = []
    for path in sorted(root.rglob("*.py")):
        source = path.read_text("utf-8")
        name = path.relative_to(root).as_posix()
        files.append(Sized(name, len(source.splitlines())))
        folders[name.split("/")[0]] += files[-1].lines
        functions.extend(functions_of(name, source))
    return Report(dict(folders), tuple(files), tuple(functions))


def breaches(report: Report, max_lines: int) -> list[str]:
    """One line per limit that is passed."""
    found = [f"file {f.name}: {f.lines} lines, limit {MAX_FILE}" for f in report.files if f.lines > MAX_FILE]
    for each in report.functions:
        limit = MAX_KERNEL if "_triton.py" in each.name else MAX_FUNCTION
        if each.lines > limit:
            found.append(f"function {each.name}: {each.lines} lines, limit {limit}")
    if report.total > max_lines:
        found.append(f"package: {report.total} lines, limit {max_lines} ([tool.penstock] max_lines)")
    return found


def show(report: Report, max_lines: int) -> None:
    for folder, lines in sorted(report.folders.items(), key=lambda item: -item[1]):
        print(f"{lines:6d}  {folder}")
    print(f"{report.total:6d}  of at most {max_lines}")
    for title, limit, items in (
        ("files", REPORT_FILE, report.files),
        ("functions", REPORT_FUNCTION, report.functions),
    ):
        for item in sorted(items, key=lambda i: -i.lines):
            if item.lines > limit:
                print(f"{title} over {limit} lines: {item.lines:4d}  {item.name}")
    lengths = [f.lines for f in report.functions] or [0]
    print(f"{len(report.functions)} functions, median {statistics.median(lengths):g} lines")


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    max_lines = int(tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["penstock"]["max_lines"])
    report = measure(root / "penstock")
    show(report, max_lines)
    found = breaches(report, max_lines)
    for line in found:
        print(f"TOO LARGE  {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
