"""The README says what the results say, and nothing that is not so."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from penstock.cli.unbuilt import VERBS
from penstock.unsupported import UNSUPPORTED
from tools.readme_tables import filled, pages

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text("utf-8")


def record(**facts: Any) -> str:
    return json.dumps({"metric": "decode_bs1", "unit": "tok/s", "model": "m", "format": "bf16", **facts})


def test_the_pages_are_in_step_with_the_results() -> None:
    for page in pages():
        text = page.read_text("utf-8")
        assert filled(text, ROOT / "bench" / "results") == text, f"{page.name}: run python tools/readme_tables.py"
        assert text.count("<!-- results:") == text.count("<!-- end of results -->")
    assert "<!-- results:" in README


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


def test_checks_have_a_table_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "a.jsonl").write_text(record(value=100.0))
    (tmp_path / "h200" / "checks.jsonl").write_text(record(metric="passed", value=98, unit="of 98", commit="abc"))
    texts = [filled(f"<!-- results:{name} -->\n<!-- end of results -->", tmp_path) for name in ("h200", "h200/checks")]
    assert "decode_bs1" in texts[0] and "passed" not in texts[0]
    assert "| m | bf16 | passed | 98 of 98 | abc |" in texts[1] and "decode_bs1" not in texts[1]


def test_peers_stand_beside_our_latest_and_the_roof_that_its_share_implies(tmp_path: Path) -> None:
    (tmp_path / "h200").mkdir()
    ours = [
        record(value=250.0, share_of_roof=0.5, commit="abc"), record(metric="lora", value=1.0),
        record(metric="ttft_mean_ms", unit="ms", value=8.0, share_of_roof=0.25),
    ]  # fmt: skip
    others = [record(value=200.0, engine="v 1"), record(metric="load_s", unit="s", value=9.0, engine="h 2")]
    (tmp_path / "h200" / "a.jsonl").write_text("\n".join(ours))
    (tmp_path / "h200" / "peers.jsonl").write_text("\n".join(others))
    text = filled("<!-- results:h200/peers -->\n<!-- end of results -->", tmp_path)
    assert "| model | format | figure | h 2 | v 1 |" in text or "| figure | v 1 | h 2 | the roof | Penstock |" in text
    assert "| m | bf16 | decode_bs1 | 200 tok/s |  | 500 | 250 tok/s | 50.0% | abc |" in text
    assert "| m | bf16 | ttft_mean_ms |  |  | 2 | 8 ms | 25.0% |  |" in text
    assert "| m | bf16 | load_s |  | 9 s |  | not measured yet |  |  |" in text and "lora" not in text
    assert "v 1" not in filled("<!-- results:h200 -->\n<!-- end of results -->", tmp_path)


def test_a_decode_rate_with_the_prompt_in_it_is_marked(tmp_path: Path) -> None:
    (tmp_path / "h200").mkdir()
    note = "over 128 tokens with the prompt's time in it"
    others = [record(value=20.0, engine="h 2", note=note), record(value=200.0, engine="v 1")]
    others += [record(metric="ttft_mean_ms", unit="ms", value=9.0, engine="h 2", note=note)]
    (tmp_path / "h200" / "peers.jsonl").write_text("\n".join(others))
    text = filled("<!-- results:h200/peers -->\n<!-- end of results -->", tmp_path)
    assert r"| 20 tok/s \* | 200 tok/s |" in text and "| 9 ms |" in text
    assert "\n\\* with the prompt's time in it, which ours leaves out.\n" in text


def test_the_tables_tool_says_what_it_does() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/readme_tables.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--check" in done.stdout and "results:NAME" in done.stdout


def test_the_looking_inside_examples_are_of_the_readmes_engine(tmp_path: Path) -> None:
    """The bundled model, converted and built as the README does: the number that docs/inside.md names is computed."""
    from penstock import bundled
    from penstock.compiler.build import read_model
    from penstock.compiler.options import BuildOptions
    from penstock.engine.device import CPU
    from penstock.runtime.batch import Batch

    page = (ROOT / "docs" / "inside.md").read_text("utf-8")
    front = read_model(bundled.target(), BuildOptions(device="cpu", max_batch_size=16, max_seq_len=1024), CPU)
    phase, number = re.findall(r"(\w+)/%(\d+),", page)[0]
    assert not front.draft.graphs[phase].nodes[int(number)].is_leaf
    batch, context = re.findall(r"--batch (\d+) --context (\d+)", page)[0]
    Batch(int(batch), int(context)).limits(front.draft.profile)


def test_figures_asked_for_by_name_are_there_or_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "a.jsonl").write_text(record(value=100.0) + "\n" + record(metric="other", value=7.0))
    text = filled("<!-- results:h200 decode_bs1 claim_graphs -->\nold\n<!-- end of results -->", tmp_path)
    assert (
        "| m | bf16 | decode_bs1 | 100 tok/s |  |  |" in text
        and "|  |  | claim_graphs | not measured yet |  |  |" in text
    )
    assert "other" not in text and filled(text, tmp_path) == text


def test_the_commands_of_the_tour_run_as_they_are_written(tmp_path: Path) -> None:
    """Those that are for the bundled model: all but the lines with MODEL."""
    tour = README[README.index("## A tour") : README.index("## How it is laid out")]
    blocks = re.findall(r"^```\n(penstock.*?)^```", tour, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "MODEL" not in line]
    (tmp_path / "penstock").symlink_to(ROOT / "penstock")
    assert [line.split()[1] for line in lines] == ["generate", "generate", "convert", "build", "run", "refit"]
    for line in [
        *lines,
        "penstock inspect ENGINE",
        "penstock check ENGINE",
        *re.findall(r"`(penstock check -.*?)`", tour),
    ]:
        words = [
            sys.executable,
            "-c",
            "import sys; from penstock.cli import main; sys.exit(main())",
            *shlex.split(line, True)[1:],
        ]
        done = subprocess.run(words, cwd=tmp_path, env=here(tmp_path), capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, f"{line}: {done.stderr}"


def test_the_python_of_the_tour_runs_as_it_is_written(tmp_path: Path) -> None:
    code = README[README.index("```python\n") + 10 :].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=here(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "top_p" not in done.stderr and (tmp_path / "engines" / "mine" / "engine.json").is_file()


def here(folder: Path) -> dict[str, str]:
    """The environment with a cache of its own, on the CPU."""
    return {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


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
