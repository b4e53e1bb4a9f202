"""An engine of other software or another device: noticed, and planned anew from its manifest alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.compiler import backend
from penstock.compiler.build import build
from penstock.compiler.refit import refit
from penstock.compiler.reselect import reselect
from penstock.engine import store
from penstock.engine.device import CPU, H200
from penstock.engine.manifest import Engine
from penstock.engine.match import mismatch
from penstock.engine.program import program_to_json
from penstock.errors import SelectionError
from penstock.kernels import layouts
from penstock.kernels.device import software
from penstock.runtime import open as open_module
from penstock.runtime.open import check_match
from tests.cpu.build.engines import contents, engine_of, options, same_weights, tiny


def doctored(engine: Path, target: Path, **changes: object) -> Path:
    """A copy of an engine whose manifest says something else, in order in every other way."""
    changed = replace(store.load(engine), **changes)  # type: ignore[arg-type]
    with store.writing(target) as part:
        shutil.copytree(engine, part, dirs_exist_ok=True)
        (part / store.FILES).unlink()
        store.save(changed, part)
    return target


def of_old_software(tmp_path: Path, case: str = "llama") -> tuple[Path, Path]:
    """(an engine for this machine, the same one as an older torch would have made it)."""
    engine = engine_of(tiny(case, tmp_path), tmp_path)
    return engine, doctored(engine, tmp_path / "old", software={"penstock": "0.0.1", "torch": "1.0"})


def test_what_differs_is_said_in_a_sentence(tmp_path: Path) -> None:
    path, old = of_old_software(tmp_path)
    engine, here = store.load(path), software(CPU)
    assert mismatch(engine, CPU, here) is None
    assert mismatch(store.load(old), CPU, here) == (
        f"the engine was compiled with penstock 0.0.1, and this is penstock {here['penstock']}"
    )
    assert mismatch(engine, CPU, {**here, "torch": "9"}) == (
        f"the engine was compiled with torch {here['torch']}, and this is torch 9"
    )
    assert mismatch(engine, CPU, {"penstock": here["penstock"]}) == (
        f"the engine was compiled with torch {here['torch']}, and this is torch absent"
    )


def test_devices_are_compared_by_what_code_depends_on(tmp_path: Path) -> None:
    engine = replace(store.load(engine_of(tiny("llama", tmp_path), tmp_path)), device=H200)
    said = "the engine was compiled for NVIDIA H200 (sm_90), and this is"
    assert mismatch(engine, CPU, engine.software) == f"{said} a CPU"
    assert mismatch(engine, replace(H200, name="NVIDIA H100"), engine.software) == f"{said} NVIDIA H100 (sm_90)"
    assert mismatch(engine, replace(H200, capability=80), engine.software) == f"{said} NVIDIA H200 (sm_80)"
    assert mismatch(engine, replace(H200, memory_bytes=1), engine.software) is None


@pytest.mark.parametrize("compiler", ["triton", "nvrtc"])
def test_running_needs_no_compiler(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = store.load(engine_of(tiny("llama", tmp_path), tmp_path))
    made = {**engine.software, "triton": "3.6.0", "nvrtc": "13.0.88"}
    engine = replace(engine, device=H200, software=made)
    assert mismatch(engine, H200, {n: v for n, v in made.items() if n != compiler}) is None
    assert mismatch(engine, H200, {**made, compiler: "absent"}) is None
    assert f"{compiler} 9.9" in str(mismatch(engine, H200, {**made, compiler: "9.9"}))
    monkeypatch.setattr(open_module, "detect", lambda _: H200)
    monkeypatch.setattr(open_module, "software", lambda _: {**made, compiler: "9.9"})
    check_match(engine)


def test_a_damaged_one_in_the_cache_is_planned_again(tmp_path: Path) -> None:
    _, old = of_old_software(tmp_path)
    out = reselect(old, CPU, tmp_path / "cache")
    for file in (store.weights_file(), store.MANIFEST):
        (out / file).unlink()
        assert reselect(old, CPU, tmp_path / "cache") == out
        store.load(out)


def test_planned_anew_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, old = of_old_software(tmp_path)
    shutil.rmtree(tmp_path / "hf")  # nobody needs the checkpoint
    before = contents(old)
    out = reselect(old, CPU, tmp_path / "cache", {}, lambda *_: None)
    assert out.parent == tmp_path / "cache" / "engines" and contents(old) == before
    new, first = store.load(out), store.load(engine)
    assert mismatch(new, CPU, software(CPU)) is None
    assert same_weights(engine, out)
    assert program_to_json(new.programs["decode"]) == program_to_json(first.programs["decode"])
    assert (new.spec, new.profile, new.tokens, new.work) == (first.spec, first.profile, first.tokens, first.work)
    assert new.source["key"] != first.source["key"] and new.source["model"] == first.source["model"]
    assert (out / store.GRAPH).read_text() == (engine / store.GRAPH).read_text()
    assert json.loads((out / store.TIMING).read_text())
    store.check(out)
    # A second time it is found.
    monkeypatch.setattr(backend, "Selector", None)
    assert reselect(old, CPU, tmp_path / "cache") == out


def test_files_in_folders_keep_their_place(tmp_path: Path) -> None:
    """Named chat templates lie in a folder of their own, through build, reselect and refit alike."""
    hf = tiny("llama", tmp_path)
    place = Path("additional_chat_templates") / "tool_use.jinja"
    (hf / place.parent).mkdir()
    (hf / place).write_text("old")
    engine = doctored(engine_of(hf, tmp_path), tmp_path / "old", software={"penstock": "0.0.1", "torch": "1.0"})
    chosen = reselect(engine, CPU, tmp_path / "cache")
    assert (engine / place).read_text() == (chosen / place).read_text() == "old"
    (hf / place).write_text("new")
    assert (refit(chosen, hf, tmp_path / "refitted") / place).read_text() == "new"
    assert not (tmp_path / "refitted" / place.name).exists()


def test_in_place_from_random_weights_and_never_mistaken_for_a_build(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    built = build(hf, options(tmp_path, weights="random"))
    key, before = store.load(built).source["key"], (built / store.weights_file()).read_bytes()
    old = doctored(built, built, software={"penstock": "0", "torch": "0"})
    assert reselect(old, CPU, tmp_path / "cache", output=old) == old
    engine = store.load(old)
    assert mismatch(engine, CPU, software(CPU)) is None and engine.source["key"] != key
    assert (old / store.weights_file()).read_bytes() == before


def test_pins_hold_and_a_wrong_one_leaves_the_engine(tmp_path: Path) -> None:
    _, old = of_old_software(tmp_path)
    before = contents(old)
    out = reselect(old, CPU, tmp_path / "cache", {"linear": "reference"})
    plans = store.load(out).programs["decode"].phases["forward"].plans
    assert store.load(out).source["tactics"] == {"linear": "reference"}
    assert {
        plan.tactic.split("[")[0] for key, by in plans.items() if key.startswith("linear(") for plan in by.values()
    } == {"reference"}
    with pytest.raises(SelectionError):
        reselect(old, CPU, tmp_path / "cache", {"linear": "nonsense"}, output=old)
    assert contents(old) == before


@pytest.fixture
def reversed_rows() -> Iterator[str]:
    """A layout of which every byte stands elsewhere."""
    layouts.register("reversed", layouts.Layout(lambda w: w.flip(0), lambda w: w.flip(0)))
    yield "reversed"
    layouts._LAYOUTS.pop("reversed")


def test_weights_in_another_layout_are_packed_anew(tmp_path: Path, reversed_rows: str) -> None:
    hf = tiny("llama", tmp_path)
    engine = engine_of(hf, tmp_path)
    packed = _packed(engine, tmp_path / "packed", reversed_rows)
    assert not same_weights(engine, packed)
    out = reselect(packed, CPU, tmp_path / "cache")
    assert same_weights(engine, out)
    assert {w.layout for w in store.load(out).weights.values()} == {layouts.PLAIN}


def _packed(engine: Path, target: Path, layout: str) -> Path:
    """The engine as if its tactics had wanted every matrix in that layout."""
    from penstock.compiler.weights import write_weights
    from penstock.models.directory import ModelDirectory

    manifest = store.load(engine)
    weights = {n: replace(w, layout=layout) if len(w.type.shape) == 2 else w for n, w in manifest.weights.items()}
    changed: Engine = replace(manifest, weights=weights, software={"penstock": "0"})
    checkpoint = ModelDirectory.open(Path(manifest.source["model"])).checkpoint()
    with store.writing(target) as part:
        shutil.copytree(engine, part, dirs_exist_ok=True)
        (part / store.FILES).unlink()
        write_weights(weights, checkpoint, part / store.weights_file(), "cpu", lambda _: None)
        store.save(changed, part)
    stored = load_file(target / store.weights_file())
    name = next(n for n, w in weights.items() if w.layout == layout)
    assert torch.equal(stored[name].flip(0), load_file(engine / store.weights_file())[name])
    return target
