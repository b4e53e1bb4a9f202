"""Writes the tables of penstock/bundled/README.md out of its results.json: `python3 tools/train/report.py FOLDER`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def tables(results: dict[str, Any]) -> str:
    perplexity = results["adapter_perplexity"]
    voices = list(perplexity["base"])
    lines = ["", f"Held-out bits per byte ({results['target']['bytes']} bytes):", ""]
    lines += [_row("model", "parameters", "all", *voices), _row(*["---"] * (3 + len(voices)))]
    for name in ("target", "draft"):
        report = results[name]
        each = [f"{report['voices'][v]['bits_per_byte']:.3f}" for v in voices]
        lines.append(_row(name, f"{results['parameters'][name]:,}", f"{report['bits_per_byte']:.3f}", *each))
    lines += ["", "Held-out perplexity per token, and its change against the base:", ""]
    lines += [_row("weights", *voices), _row(*["---"] * (1 + len(voices)))]
    for name, row in perplexity.items():
        lines.append(_row(name, *(_change(row[v], perplexity["base"][v]) for v in voices)))
    e = results["environment"]
    lines += ["", f"Trained in {results['seconds'] / 60:.1f} minutes on one {e['device']} (torch {e['torch']}).", ""]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _change(value: float, base: float) -> str:
    return f"{value:.2f}" if value == base else f"{value:.2f} ({value / base - 1:+.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    readme = folder / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    readme.write_text(before + BEGIN + "\n" + tables(results) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
