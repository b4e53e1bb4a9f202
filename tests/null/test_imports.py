"""What a process pays for before it has asked for anything: `import penstock` loads nothing heavy, and is quick."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "triton", "transformers", "numpy", "safetensors", "tokenizers", "jinja2", "cuda")
LIMIT = 0.3  # seconds, the interpreter's own start included
LIGHT = """
import sys
import {module}
loaded = [name for name in {heavy!r} if name in sys.modules]
own = [name for name in sys.modules if name.split(".")[0] == "penstock"]
print(loaded, len(own))
assert not loaded and len(own) <= {most}, (loaded, own)
"""


def run(source: str) -> float:
    """Seconds of a fresh process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", source], check=True, cwd=ROOT)
    return time.perf_counter() - start


@pytest.mark.parametrize(("module", "most"), [("penstock", 2), ("penstock.runtime", 4), ("penstock.errors", 4)])
def test_an_import_loads_nothing_heavy(module: str, most: int) -> None:
    run(LIGHT.format(module=module, heavy=HEAVY, most=most))


def test_importing_the_package_takes_less_than_the_limit() -> None:
    """The best of several: a busy machine makes some slow, none fast."""
    times: list[float] = []
    while len(times) < 5 and min(times, default=LIMIT) >= LIMIT:
        times.append(run("import penstock"))
    assert min(times) < LIMIT, times


def test_public_names_without_torch() -> None:
    run("import sys, penstock; penstock.SamplingParams(), penstock.PenstockError; assert 'torch' not in sys.modules")
