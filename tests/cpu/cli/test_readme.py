"""The README says what the results say, and nothing that is not so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from penstock.cli.unbuilt import VERBS
from penstock.unsupported import UNSUPPORTED
from tools.readme_tables import filled

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text("utf-8")


def record(**facts: Any) -> str:
    return json.dumps({"metric": "decode_bs1", "unit": "tok/s", "model": "m", "format": "bf16", **facts})


def test_the_readme_is_in_step_with_the_results() -> None:
    assert filled(README, ROOT / "bench" / "results") == README, "run: python tools/readme_tables.py"
    assert README.count("<!-- results:") == README.count("<!-- end of results -->") >= 1


def test_a_table_holds_the_latest_of_each_figure_and_its_share(tmp_path: Path) -> None:
    lines = [
        record(value=100.0), record(metric="build_s", unit="s", value=41.25),
        record(value=251.4, spread=1.26, share_of_roof=0.8712, commit="abc", environment={"device": "X", "torch": "2"}),
    ]  # fmt: skip
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "a.jsonl").write_text("\n".join(lines))
    text = filled("a\n<!-- results:h200 -->\nold\n<!-- end of results -->\nb", tmp_path)
    assert "| m | bf16 | decode_bs1 | 251 ± 1.26 tok/s | 87.1% | abc |" in text and "100 tok/s" not in text
    assert "| m | bf16 | build_s | 41.2 s |  |  |" in text and "Measured with device X, torch 2." in text
    assert "old" not in text and text.startswith("a\n") and text.endswith("\nb")
    assert filled(text, tmp_path) == text


def test_missing_results_are_said_to_be_missing(tmp_path: Path) -> None:
    assert "No results are kept yet" in filled("<!-- results:x -->\n<!-- end of results -->", tmp_path)


def test_every_verb_that_is_not_built_is_named_as_such() -> None:
    limits = README[README.index("## What is not built yet") :]
    for verb in VERBS:
        assert f"penstock {verb}" in UNSUPPORTED and f"`{verb}`" in limits


def test_every_file_that_the_documentation_points_to_exists() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} points to {target}"
