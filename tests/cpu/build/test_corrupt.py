"""Engines whose files agree with their inventory and checksum, and still hold nonsense: one typed error each."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.cli import main
from penstock.engine import manifest, store
from penstock.errors import EngineCorruptError

Change = Callable[[Any], Any]


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_engine, tmp_path / "engine"))


def agree(directory: Path, file: str) -> None:
    """Make the inventory say what the file holds now."""
    inventory = json.loads((directory / store.FILES).read_text())
    path = directory / file
    inventory[file] = {"size": path.stat().st_size, "fingerprint": store.fingerprint(path)}
    (directory / store.FILES).write_text(json.dumps(inventory))


def change_manifest(directory: Path, change: Change) -> None:
    data = json.loads((directory / store.MANIFEST).read_text())
    data.pop("checksum")
    change(data)
    (directory / store.MANIFEST).write_text(json.dumps({**data, "checksum": manifest.checksum(data)}))
    agree(directory, store.MANIFEST)


def phase(data: Any) -> Any:
    return data["programs"]["decode"]["phases"]["forward"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.update(roof={"a": 1}), "roof"),
        (lambda d: d.update(roof={"read_bytes_per_s": "fast", "flops_per_s": 1}), "roof"),
        (lambda d: d.update(roof={"read_bytes_per_s": 0, "flops_per_s": 1}), "roof"),
        (lambda d: d.update(roof=None), "roof"),
        (lambda d: d.update(programs={}), "'decode'"),
        (lambda d: d.update(programs=[]), "engine.json lacks or mistakes"),
        (lambda d: d["programs"]["decode"]["phases"].pop("sample"), "no phase 'sample'"),
        (lambda d: d["programs"]["decode"].update(buckets={}), "buckets"),
        (lambda d: phase(d).update(sites={}), "no plan for"),
        (lambda d: phase(d).update(plans=[]), "engine.json lacks or mistakes"),
        (lambda d: phase(d).update(graph=["nonsense"]), "engine.json lacks or mistakes"),
        (lambda d: d.update(weights={}), "weights lacks"),
        (lambda d: d.update(weights=[1]), "engine.json lacks or mistakes"),
        (lambda d: d.update(spec={}), "engine.json lacks or mistakes"),
        (lambda d: d.update(profile={"max_batch_size": "4"}), "engine.json lacks or mistakes"),
        (lambda d: d["profile"].update(max_batch_size="4"), "max_batch_size='4'"),
        (lambda d: d["device"].update(kind="abacus"), "device"),
        (lambda d: d["device"].update(kind="cuda"), "buffers"),
        (lambda d: d.update(arena=None), "arena"),
        (lambda d: d.update(work={}), "work"),
        (lambda d: d["work"].update(weight_bytes=0), "work"),
        (lambda d: d.update(tokens={"eos": "x"}), "tokens"),
        (lambda d: d.update(report=[{}]), "engine.json lacks or mistakes"),
        (lambda d: d.update(build_seconds={"total": "long"}), "build_seconds"),
        (lambda d: d.update(source=[]), "source"),
    ],
)
def test_a_manifest_that_no_build_writes(engine: Path, change: Change, named: str) -> None:
    change_manifest(engine, change)
    with pytest.raises(EngineCorruptError, match=f"{named}.*build the engine again"):
        store.load(engine)


def test_a_manifest_that_was_written_again_is_good(engine: Path) -> None:
    change_manifest(engine, lambda data: data.update(roof={"read_bytes_per_s": 1e12, "flops_per_s": 1}))
    assert store.load(engine).roof["flops_per_s"] == 1


@pytest.mark.parametrize("length", [2**64 - 1, 1 << 45, 1 << 20])
def test_a_header_beyond_the_file_is_not_read(engine: Path, length: int) -> None:
    path = engine / store.weights_file()
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(EngineCorruptError, match=f"cannot hold a header of {length} bytes"):
        store.load(engine)


def test_weights_of_a_few_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    with pytest.raises(EngineCorruptError, match="of 3 bytes cannot hold a header"):
        store.fingerprint(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("timing", "named"),
    [
        ([], "holds no JSON object"),
        ({"x": []}, "'x'"),
        ({"x": {"points": []}}, "'x'"),
        ({"x": {"points": {"any": []}}}, "'x'"),
        ({"x": {"points": {"any": {"reference": [1]}}}}, "'x'"),
        ({"x": {"points": {"any": {"reference": {"median_us": "1", "spread_us": 1}}}}}, "'x'"),
        ({"x": {"points": {"any": {"reference": {"median_us": 1}}}}}, "'x'"),
        ({"x": {"points": {}, "cannot": {"reference": 1}}}, "'x'"),
    ],
)
def test_inspect_names_a_timing_file_it_cannot_use(
    engine: Path, timing: Any, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (engine / store.TIMING).write_text(json.dumps(timing))
    agree(engine, store.TIMING)
    assert main(["inspect", str(engine)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and named in said and "build the engine again" in said


@pytest.mark.parametrize(
    ("file", "verb"),
    [
        (store.TIMING, "inspect {engine}"),
        (store.GRAPH, "inspect {engine} --graph"),
        (store.weights_file(), "run --input_text x --engine_dir {engine}"),
    ],
)
def test_a_file_that_the_inventory_forgot_is_missed(
    engine: Path, file: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inventory = json.loads((engine / store.FILES).read_text())
    inventory.pop(file)
    (engine / store.FILES).write_text(json.dumps(inventory))
    (engine / file).unlink()
    assert main(verb.format(engine=engine).split()) == 1
    said = capsys.readouterr().err
    assert file in said and "build the engine again" in said and "Traceback" not in said


def test_an_inventory_of_nothing_vouches_for_nothing(engine: Path) -> None:
    (engine / store.FILES).write_text("{}")
    with pytest.raises(EngineCorruptError, match=r"does not list engine\.json"):
        store.load(engine)
