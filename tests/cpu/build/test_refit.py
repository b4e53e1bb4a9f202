"""Refit: other weights of the same spec, and nothing timed, compiled or half-written."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.compiler import refit as module
from penstock.compiler.build import build
from penstock.compiler.convert import convert
from penstock.compiler.refit import refit
from penstock.compiler.reselect import reselect
from penstock.engine import store
from penstock.engine.device import CPU
from penstock.errors import CheckpointError, ConfigError, EngineCorruptError, RefitError, ResourceError
from tests.cpu.build.engines import contents, engine_of, options, same_weights, tiny


def other(hf: Path, tmp_path: Path, name: str = "other") -> Path:
    """The same model trained to other numbers."""
    shutil.copytree(hf, tmp_path / name)
    torch.manual_seed(5)
    tensors = {k: t + torch.randn_like(t) for k, t in load_file(hf / "model.safetensors").items()}
    save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path / name


@pytest.mark.parametrize("case", ["llama", "llama-mha-tied", "qwen2", "gemma"])
def test_refit_is_what_building_gives(case: str, tmp_path: Path) -> None:
    """Fused, aligned (the vocabulary is 99) and tied weights too."""
    hf = tiny(case, tmp_path)
    new = other(hf, tmp_path)
    engine, built = engine_of(hf, tmp_path), engine_of(new, tmp_path, "built")
    before = contents(engine)
    assert not same_weights(engine, built)
    out = refit(engine, new, tmp_path / "refitted")
    assert out == tmp_path / "refitted" and same_weights(out, built)
    assert contents(engine) == before
    assert store.load(out).weights.keys() == store.load(engine).weights.keys()
    store.check(out)


def test_in_place_and_back(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    engine = engine_of(hf, tmp_path)
    before = (engine / store.weights_file()).read_bytes()
    kept = {p.name for p in engine.iterdir()}
    assert refit(engine, other(hf, tmp_path)) == engine
    assert (engine / store.weights_file()).read_bytes() != before
    assert {p.name for p in engine.iterdir()} == kept
    refit(engine, hf)
    assert (engine / store.weights_file()).read_bytes() == before


def test_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine stays; a name of its own, found a second time and made again when damaged; no chain of names."""
    hf = tiny("llama", tmp_path)
    new, cache = other(hf, tmp_path), tmp_path / "cache" / "engines"
    engine = build(hf, options(tmp_path))
    before = contents(engine)
    out = refit(engine, new, cache=cache)
    assert out.parent == cache and out.name.startswith(f"{engine.name}-refit-") and contents(engine) == before
    assert same_weights(out, engine_of(new, tmp_path, "built"))
    (out / store.MANIFEST).unlink()
    assert refit(engine, new, cache=cache) == out and same_weights(out, tmp_path / "built")
    back = refit(out, hf, cache=cache)
    assert back.name.count("-refit-") == 1 and same_weights(back, engine)
    monkeypatch.setattr(module, "write_weights", None)
    assert refit(engine, new, cache=cache) == refit(back, new, cache=cache) == out


def test_a_refit_of_a_reselected_engine_is_not_taken_for_one_of_the_first(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    new, cache = other(hf, tmp_path), tmp_path / "cache" / "engines"
    first = refit(engine_of(hf, tmp_path), new, cache=cache)
    anew = reselect(first, CPU, tmp_path / "cache", {"linear": "reference"})
    assert refit(anew, new, cache=cache) != first


def test_the_tokenizer_is_in_the_name(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    engine, new, cache = engine_of(hf, tmp_path), other(hf, tmp_path), tmp_path / "cache" / "engines"
    (new / "tokenizer_config.json").write_text('{"a": 1}')
    first = refit(engine, new, cache=cache)
    (new / "tokenizer_config.json").write_text('{"a": 2}')
    assert refit(engine, new, cache=cache) != first


def test_from_one_converted_checkpoint_to_another(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    first = convert(hf, tmp_path / "first", tp_size=2)
    second = convert(other(hf, tmp_path), tmp_path / "second", tp_size=2)
    out = refit(engine_of(first, tmp_path), second)
    assert same_weights(out, engine_of(second, tmp_path, "built"))


def test_a_build_does_not_mistake_it(tmp_path: Path) -> None:
    """An engine of the cache that was refitted in place is the build of neither model."""
    hf = tiny("llama", tmp_path)
    new = other(hf, tmp_path)
    engine = build(hf, options(tmp_path))
    key, weights = store.load(engine).source["key"], (engine / store.weights_file()).read_bytes()
    refit(engine, new)
    source = store.load(engine).source
    assert source["key"] != key and source["model"] == str(new.resolve())
    assert build(hf, options(tmp_path)) == engine
    assert (engine / store.weights_file()).read_bytes() == weights
    assert store.load(engine).source["key"] == key


def test_tokenizer_and_generation_settings_go_with_the_weights(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    (hf / "tokenizer_config.json").write_text('{"a": 1}')
    (hf / "added_tokens.json").write_text("{}")
    new, bare = other(hf, tmp_path), other(hf, tmp_path, "bare")
    (new / "tokenizer_config.json").write_text('{"a": 2}')
    (new / "added_tokens.json").unlink()
    (new / "generation_config.json").write_text('{"eos_token_id": [5]}')
    for file in ("tokenizer_config.json", "added_tokens.json", "generation_config.json"):
        (bare / file).unlink(missing_ok=True)
    engine = engine_of(hf, tmp_path)
    out = refit(engine, new, tmp_path / "out")
    assert (out / "tokenizer_config.json").read_text() == '{"a": 2}' and not (out / "added_tokens.json").exists()
    assert store.load(out).tokens["eos"] == [5]
    again = refit(out, bare, tmp_path / "again")  # it brings none, so the engine keeps its own
    assert (again / "tokenizer_config.json").read_text() == '{"a": 2}' and store.load(again).tokens["eos"] == [5]


def test_nothing_that_times_or_compiles_is_imported(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    engine, new = engine_of(hf, tmp_path), other(hf, tmp_path)
    code = (
        "import sys; from pathlib import Path; from penstock.compiler.refit import refit\n"
        "refit(*map(Path, sys.argv[1:]))\n"
        "print(*sorted(m for m in sys.modules if m.startswith(('penstock.', 'triton'))))"
    )
    run = [sys.executable, "-c", code, str(engine), str(new)]
    loaded = set(subprocess.run(run, capture_output=True, text=True, check=True).stdout.split())
    assert "penstock.compiler.weights" in loaded
    never = ("select", "timing", "timing_cache", "worker", "workers", "candidates", "backend", "build", "pipeline")
    assert not loaded & {f"penstock.compiler.{name}" for name in never}
    assert not [m for m in loaded if m.startswith("triton") or m.endswith("_triton") or m == "penstock.kernels.compile"]


def test_another_spec_is_refused(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    engine = engine_of(hf, tmp_path)
    before = contents(engine)
    for case, message in (
        ("llama-mqa", r"layers\[0\]\.count: 2 in the engine, 3 in the checkpoint"),
        ("llama-theta", r"mixer\.rope\.theta: 10000\.0 in the engine, 500\.0 in the checkpoint"),
        ("llama-biases", r"qkv_bias: False in the engine, True in the checkpoint"),
        ("llama-mha-tied", r"tied_head: False in the engine, True in the checkpoint"),
        ("llama-yarn", "Yarn"),
    ):
        with pytest.raises(RefitError, match=message):
            refit(engine, tiny(case, tmp_path, case))
    config = json.loads((hf / "config.json").read_text()) | {"vocab_size": 98}
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefitError, match="vocab_size: 99 in the engine, 98 in the checkpoint"):
        refit(engine, hf)
    assert contents(engine) == before


def test_other_tensor_names_are_refused(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    converted, dealt = convert(hf, tmp_path / "a"), convert(hf, tmp_path / "b", tp_size=2)
    engine = engine_of(hf, tmp_path)
    with pytest.raises(RefitError, match=r"model\.embed_tokens\.weight: \[99, 48\] in the engine, absent"):
        refit(engine, converted)
    with pytest.raises(RefitError, match=r"attention\.qkv\.weight: \[96, 48\] in the engine, \[48, 48\]"):
        refit(engine_of(converted, tmp_path, "engine2"), dealt)


def test_a_checkpoint_that_cannot_be_read_is_refused_as_ever(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    engine, new = engine_of(hf, tmp_path), other(hf, tmp_path)
    before, whole = contents(engine), (new / "model.safetensors").read_bytes()
    (new / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        refit(engine, new)
    tensors = load_file(hf / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, new / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is F32\[3\]"):
        refit(engine, new)
    (new / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "x": 1}')
    with pytest.raises(ConfigError):
        refit(engine, new)
    assert contents(engine) == before


def test_random_weights_cannot_be_refitted(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    engine = engine_of(hf, tmp_path, weights="random")
    with pytest.raises(RefitError, match="random numbers"):
        refit(engine, hf)


def test_a_corrupt_engine_is_refused(tmp_path: Path) -> None:
    hf = tiny("llama", tmp_path)
    engine = engine_of(hf, tmp_path)
    (engine / store.weights_file()).write_bytes(b"short")
    with pytest.raises(EngineCorruptError):
        refit(engine, hf)


def test_a_full_disk_leaves_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny("llama", tmp_path)
    engine = engine_of(hf, tmp_path)
    before = contents(engine)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_weights", full)
    with pytest.raises(ResourceError, match="no space left"):
        refit(engine, other(hf, tmp_path))
    assert contents(engine) == before
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "engine", "hf", "other"}
