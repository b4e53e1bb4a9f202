"""A fresh clone: its own environment by `make`, the demo, and the command that `make test` runs, on a few tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.long import results

pytestmark = pytest.mark.long
FROM_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "VIRTUAL_ENV", "PYTHONPATH")


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not (shutil.which("git") and shutil.which("make")), reason="needs git and make")
def test_a_clone_installs_and_speaks(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    seconds: dict[str, float] = {}
    # Nothing of the environment that runs the tests may reach in; the cache of engines is the clone's own.
    environment = {k: v for k, v in os.environ.items() if k not in FROM_MAKE}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    def run(name: str, *command: str, folder: Path = clone) -> str:
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        seconds[name] = time.perf_counter() - start
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    run("clone", "git", "clone", "--quiet", "--no-hardlinks", str(results.ROOT), str(clone), folder=tmp_path)
    head = run("head", "git", "rev-parse", "HEAD").strip()
    run("environment", "make", ".venv/.stamp", f"PYTHON={sys.executable}")
    text = run("demo", "make", "demo", f"PYTHON={sys.executable}")
    again = run("demo again", str(clone / ".venv/bin/penstock"), "demo")
    tests = run("some tests", str(clone / ".venv/bin/python"), "-m", "pytest", "-q", "-n", "2", "tests/null/engine")
    results.write("fresh_clone", cloned=head, seconds=seconds, demo=text, tests=tests.strip().splitlines()[-1])
    for word in ("engine:", "first token", "decode", "the roof:"):
        assert word in text
    assert spoken(text) and spoken(text) == spoken(again), "the same seed gives the same text"
    assert run("status", "git", "status", "--porcelain") == "", "using the clone leaves nothing behind in it"


def spoken(text: str) -> str:
    """What the demo's model wrote: the part between the engine's lines and the table."""
    return text.partition("\n\n")[2].partition("\n\n  stage")[0].strip()
