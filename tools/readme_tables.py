"""Tables of the README, made from the results that are kept: `python tools/readme_tables.py`, or with --check.

Between `<!-- results:NAME -->` and `<!-- end of results -->` stands the table of bench/results/NAME/*.jsonl: the latest
record of each model, format and figure. `results:NAME/checks` is the table of NAME/checks.jsonl alone, which holds
what is right rather than fast and is left out of the other. A figure is never typed by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.compile(r"(<!-- results:([\w./-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
CHECKS = "checks"  # the name of a file of results that are not of speed
NOTHING = "No results are kept yet: `bench/results/{name}/` is empty.\n"
Record = Mapping[str, Any]


def filled(readme: str, results: Path) -> str:
    """The README's text with every section made anew."""
    return SECTION.sub(lambda m: m[1] + section(m[2], results / m[2]) + m[3], readme)


def section(name: str, folder: Path) -> str:
    """The table of one machine's results, with the environments that they were measured in; or of its checks."""
    checks = folder.name == CHECKS
    files = [folder.with_suffix(".jsonl")] if checks else sorted(folder.glob("*.jsonl"))
    kept = (file for file in files if (file.stem == CHECKS) == checks and file.is_file())
    lines = [line for file in kept for line in file.read_text("utf-8").splitlines()]
    if not lines:
        return NOTHING.format(name=name)
    records = sorted((json.loads(line) for line in lines), key=lambda record: str(record.get("when", "")))
    records = latest(records)
    names = ["model", "format", "check", "result"] if checks else ["model", "format", "figure", "value", "of the roof"]
    head = [_line([*names, "commit"]), "|---" * (len(names) + 1) + "|"]
    rows = [_line(_cells(record, checks)) for record in records]
    return "\n".join(["", *head, *rows, "", *_environments(records), ""]) + "\n"


def latest(records: Sequence[Record]) -> list[Record]:
    """Of each model, format and figure the last written, in the order in which they first appear."""
    found: dict[tuple[str, str, str], Record] = {}
    for record in records:
        found[record["model"], record["format"], record["metric"]] = record
    return list(found.values())


def _cells(record: Record, checks: bool) -> list[str]:
    share, spread = record.get("share_of_roof"), record.get("spread")
    value = _number(record["value"]) + (f" ± {_number(spread)}" if spread else "") + f" {record['unit']}"
    roof = [] if checks else ["" if share is None else f"{share:.1%}"]
    return [record["model"], record["format"], record["metric"], value, *roof, record.get("commit", "")]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    """Three digits or all before the point, with thousands set apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _environments(records: Sequence[Record]) -> list[str]:
    texts = (", ".join(f"{k} {v}" for k, v in sorted(r.get("environment", {}).items())) for r in records)
    return [f"Measured with {text}." for text in dict.fromkeys(texts) if text]


def main(words: Sequence[str]) -> int:
    readme = ROOT / "README.md"
    old = readme.read_text("utf-8")
    new = filled(old, ROOT / "bench" / "results")
    if "--check" in words:
        print("README.md is in step" if new == old else "README.md is out of step; run tools/readme_tables.py")
        return int(new != old)
    readme.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
