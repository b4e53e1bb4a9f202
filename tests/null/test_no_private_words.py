"""No pickle, no remote code, no eval, no environment variable beyond three, no path of one person's machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED_FOLDERS = {"build", "out", "bundled", "node_modules"}
SUFFIXES = {".py", ".toml", ".md", ".txt", ".sh", ".cfg", ".yml", ".yaml", ".cu", ".cuh", ".json"}
NAMES = {"Makefile", "run"}

# They say where to look for files and whether to use the network; none changes a result.
# Those of ranks only refuse: more than are built. Those of threads are set, by a process for itself.
ENVIRONMENT = (
    "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "HF_TOKEN", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE", "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
)  # fmt: skip

EVERYWHERE = {
    "pickle": re.compile(r"^\s*(?:import|from)\s+(?:pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve)\b", re.M),
    "remote code": re.compile(r"trust_remote_code\s*=\s*True"),
    "eval": re.compile(r"(?<![\w.])eval\("),
    "a machine's path": re.compile(r"(?<![\w.<>{}~-])/(?:home|root|work|Users)/\w"),
}
IN_PACKAGE = {
    "exec": re.compile(r"(?<![\w.])exec\("),
    "torch.load": re.compile(r"\btorch\.load\("),
    "an environment variable": re.compile(
        rf"\benviron\b(?!(?:\[|\.get\(|\.pop\()[\"'](?:{'|'.join(ENVIRONMENT)})[\"'])"
        rf"|\bgetenv\((?![\"'](?:{'|'.join(ENVIRONMENT)})[\"'])"
    ),
}


def _is_source_folder(name: str) -> bool:
    hidden = name.startswith(".") and name != ".ci"
    return not (hidden or name in SKIPPED_FOLDERS or name.endswith(".egg-info"))


def text_files() -> Iterator[Path]:
    """Every text file of the repository but this one, hidden folders other than .ci left out."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(filter(_is_source_folder, folders))
        for path in (Path(folder) / name for name in sorted(names)):
            if path != Path(__file__).resolve() and (path.suffix in SUFFIXES or path.name in NAMES):
                yield path


def breaches(path: str, text: str) -> list[str]:
    """One line per banned pattern found in the text of the repository path `path`."""
    patterns = EVERYWHERE | (IN_PACKAGE if path.startswith("penstock/") else {})
    return [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {what}"
        for what, pattern in patterns.items()
        for match in pattern.finditer(text)
    ]


def test_no_file_holds_a_banned_pattern() -> None:
    found = [
        line
        for path in text_files()
        for line in breaches(path.relative_to(ROOT).as_posix(), path.read_text("utf-8", errors="replace"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "    from pickle import loads",
        "f(trust_remote_code=True)",
        "x = eval('1')",
        "exec(code)",
        "torch.load(path)",
        'os.environ["PENSTOCK_FAST"]',
        'os.environ.get("TRITON_INTERPRET")',
        "from os import environ",
        'os.getenv("HOME")',
        'open("/home/me/x")',
    ],
)
def test_a_planted_pattern_is_found(text: str) -> None:
    assert breaches("penstock/x.py", f"\n{text}\n") != []


@pytest.mark.parametrize(
    "text",
    ["model.eval()", "ast.literal_eval(x)", 'os.environ.get("HF_TOKEN")', "os.environ['XDG_CACHE_HOME']", "a/work/b"],
)
def test_harmless_text_passes(text: str) -> None:
    assert breaches("penstock/x.py", text) == []
