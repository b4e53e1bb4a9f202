"""Names to directories: local ones, a fake hub, its cache, and what may go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.errors import ModelError
from penstock.models.hub import resolve
from tests.cpu.models.fake_hub import FakeHub, fake_hub

WANTED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
UNWANTED = {"pytorch_model.bin", "modeling_evil.py", "original/params.json", "consolidated.safetensors", "README.md"}
SCRIPT = """
import sys
from penstock.errors import ModelError
from penstock.models.hub import resolve
for name in sys.argv[1:]:
    try:
        print(resolve(*name.split("@")))
    except ModelError as error:
        print("ModelError:", error)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    for name in WANTED | UNWANTED:
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"contents of {name}")
    with fake_hub("tiny/llama", tmp_path / "model") as served:
        yield served


def run(endpoint: str, home: Path, *names: str, offline: bool = False) -> list[str]:
    """`resolve` in a process of its own: huggingface_hub reads its settings when it is imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "01"[offline]}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_download_then_offline(hub: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    folder, missing, revision, gated, nonsense = run(
        hub.url, home, "tiny/llama", "tiny/none", "tiny/llama@v9", "gated/x", "a b/c"
    )
    assert {path.name for path in Path(folder).iterdir()} == WANTED == set(hub.served)
    assert (Path(folder) / "config.json").read_text() == "contents of config.json"
    assert "tiny/none is no directory, nor a model of the hub" in missing
    assert "no revision 'v9'" in revision
    assert "gated" in gated and "HF_TOKEN" in gated
    assert "neither a directory nor a hub name" in nonsense

    hub.served.clear()
    again, unknown = run("http://127.0.0.1:9", home, "tiny/llama", "tiny/other", offline=True)
    assert again == folder and not hub.served
    assert unknown.startswith("ModelError: tiny/other is no directory") and "HF_HUB_OFFLINE" in unknown


def test_hub_out_of_reach(tmp_path: Path) -> None:
    (line,) = run("http://127.0.0.1:9", tmp_path, "tiny/llama")
    assert line.startswith("ModelError: tiny/llama is no directory") and "out of reach" in line


def test_local_directory(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path == resolve(str(tmp_path))
    with pytest.raises(ModelError, match="revision 'main' is for hub names"):
        resolve(tmp_path, revision="main")
    with pytest.raises(ModelError, match="is no directory; name an existing one"):
        resolve(tmp_path / "missing")
