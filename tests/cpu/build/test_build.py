"""A build: cached, atomic, honest about what it was given; an engine directory that is damaged says so."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from penstock.compiler import backend
from penstock.compiler import build as build_module
from penstock.compiler import weights as weights_module
from penstock.compiler.build import build, build_key, read_model
from penstock.compiler.options import BuildOptions
from penstock.compiler.timing import Timing
from penstock.compiler.timing_cache import TimingCache
from penstock.engine import manifest, store
from penstock.engine.device import CPU, H200
from penstock.errors import (
    ConfigError,
    EngineCorruptError,
    EngineError,
    EngineSchemaError,
    OptionError,
    ResourceError,
)
from penstock.ir.text import graph_to_json
from penstock.kernels import compile as compile_module
from penstock.kernels import registry, tactic
from penstock.kernels.compile import Binary, stored

SMALL = {"max_batch_size": 4, "max_num_tokens": 24}


def options(cache: Path, **changes: Any) -> BuildOptions:
    return BuildOptions(**({"device": "cpu", "cache_dir": cache, **SMALL} | changes))


def test_building_again_is_a_look_up(
    tiny_model: Path, tiny_engine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("planned again")

    monkeypatch.setattr(build_module, "plan_engine", never)
    assert build(tiny_model, options(cache)) == tiny_engine
    with pytest.raises(AssertionError, match="planned again"):
        build(tiny_model, options(cache, max_batch_size=3))


def test_weights_are_the_checkpoints(tiny_model: Path, tiny_engine: Path) -> None:
    """Fused weights are their parts, in order, bit for bit."""
    source, built = load_file(tiny_model / "model.safetensors"), load_file(tiny_engine / store.weights_file())
    prefix = "model.layers.1.self_attn."
    fused = torch.cat([source[f"{prefix}{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(built[f"{prefix}q_proj+k_proj+v_proj.weight"], fused)
    assert sum(t.numel() for t in built.values()) >= sum(t.numel() for t in source.values())


def test_every_fused_node_was_timed_against_its_parts(tiny_engine: Path) -> None:
    timing = json.loads((tiny_engine / store.TIMING).read_text())
    fused = [
        site for site in timing if site.split("(")[0] in ("add_rms_norm", "linear_glu", "rope_attention", "packed_glu")
    ]
    assert fused
    for site in fused:
        assert all("parts" in row for row in timing[site]["points"].values()), site


def test_the_manifest_reads_back_as_it_was(tiny_engine: Path, tmp_path: Path) -> None:
    engine = store.load(tiny_engine)
    with store.writing(tmp_path / "copy") as part:
        store.save(engine, part)
    again = store.load(tmp_path / "copy")
    assert again.profile == engine.profile and again.weights.keys() == engine.weights.keys()
    for name, phase in engine.programs["decode"].phases.items():
        other = again.programs["decode"].phases[name]
        assert graph_to_json(other.graph) == graph_to_json(phase.graph) and other.plans == phase.plans


def test_random_weights_need_no_checkpoint_and_repeat(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_model / "config.json", bare)
    first = build(bare, options(cache, weights="random"), tmp_path / "one")
    second = build(bare, options(tmp_path / "other", weights="random"), tmp_path / "two")
    one, two = (load_file(p / store.weights_file()) for p in (first, second))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    matrices = [m for m in one.values() if m.shape == (64, 128)]
    assert matrices
    for matrix in matrices:
        assert 0.9 < float(matrix.std()) * matrix.shape[1] ** 0.5 < 1.1, "scaled to keep what it multiplies"


def test_a_full_disk_leaves_nothing(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights_module.os, "pwrite", full)
    with pytest.raises(ResourceError, match=r"no space left under .* free some"):
        build(tiny_model, options(tmp_path / "cache"), tmp_path / "out" / "engine")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_directory_of_something_else_is_not_replaced(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(EngineError, match="exists and is no engine"):
        build(tiny_model, options(cache), tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        (store.weights_file(), _cut, "bytes were written"),
        (store.weights_file(), Path.unlink, "missing"),
        (store.MANIFEST, _flip, "was changed"),
        ("tokenizer.json", _flip, "was changed"),
        (store.FILES, _cut, "cannot be read"),
    ],
)
def test_a_damaged_engine_is_named(
    tiny_engine: Path, tmp_path: Path, file: str, damage: Callable[[Path], None], named: str
) -> None:
    copy = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    damage(copy / file)
    with pytest.raises(EngineCorruptError, match=named):
        store.load(copy)


def _no_fingerprints(path: Path) -> None:
    path.write_text(json.dumps({name: {"size": 1} for name in json.loads(path.read_text())}))


def _old_schema(path: Path) -> None:
    with store.writing(path.parent) as part:
        (part / path.name).write_text(json.dumps(json.loads(path.read_text()) | {"schema": 0}))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (store.weights_file(), _cut),
        (store.weights_file(), Path.unlink),
        (store.MANIFEST, Path.unlink),
        (store.MANIFEST, _flip),
        (store.MANIFEST, _old_schema),
        (store.FILES, _cut),
        (store.FILES, _no_fingerprints),
    ],
)
def test_a_damaged_engine_of_the_cache_is_built_again(
    tiny_model: Path, tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    made = build(tiny_model, options(tmp_path / "cache"))
    weights = (made / store.weights_file()).read_bytes()
    damage(made / file)
    assert build(tiny_model, options(tmp_path / "cache")) == made
    store.load(made)
    assert (made / store.weights_file()).read_bytes() == weights
    assert [p.name for p in made.parent.iterdir()] == [made.name], "and nothing is left beside it"


def test_a_damaged_engine_elsewhere_is_built_again_too(tiny_model: Path, tiny_engine: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    _cut(copy / store.weights_file())
    assert build(tiny_model, options(tmp_path / "cache"), copy) == copy
    store.load(copy)


def test_the_old_engine_comes_back_when_the_last_rename_fails(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"), store.writing(copy) as part:
        shutil.copytree(tiny_engine, part, dirs_exist_ok=True)
    store.load(copy)
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


def _key(model: Path) -> str:
    return build_key(read_model(model, BuildOptions(device="cpu"), CPU), CPU)


def test_what_a_build_depends_on_is_in_its_key(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text files by content, tactics by version, kernels by source."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    keys = [_key(model)]
    assert _key(model) == keys[0]
    (model / "chat_template.jinja").write_text("{{ messages }}")
    keys.append(_key(model))
    (model / "chat_template.jinja").write_text("{{ messages}}")
    keys.append(_key(model))
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("</s>", "</S>"))
    keys.append(_key(model))
    monkeypatch.setattr(type(registry.tactics("linear")[0]), "version", 77)
    keys.append(_key(model))
    monkeypatch.setattr(tactic, "source_hash", lambda _: "edited")
    keys.append(_key(model))
    assert len(set(keys)) == len(keys)


def test_weight_expressions_are_in_the_key(tiny_model: Path) -> None:
    front = read_model(tiny_model, BuildOptions(device="cpu"), CPU)
    names = list(front.draft.weights)
    swapped = {**front.draft.weights, names[0]: front.draft.weights[names[1]]}
    other = replace(front, draft=replace(front.draft, weights=swapped))
    assert build_key(other, CPU) != build_key(front, CPU)


@pytest.mark.parametrize(
    ("config", "format"), [({}, "f32"), ({"dtype": "bfloat16"}, "bf16"), ({"torch_dtype": "float16"}, "f16")]
)
def test_a_gpu_takes_the_stored_format(config: dict[str, str], format: str) -> None:
    assert BuildOptions().format(config, H200) == format
    assert BuildOptions().format(config, CPU) == "f32"


def test_a_stored_format_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match="float8_e4m3fn"):
        BuildOptions().format({"dtype": "float8_e4m3fn"}, H200)


def test_kernels_of_another_compiler_lie_elsewhere(tmp_path: Path) -> None:
    versions = [{"triton": t, "nvrtc": n} for t in ("3.6.0", "3.7.0") for n in ("13.0.88", "13.1.80")]
    folders = {backend.kernel_folder(tmp_path, H200, v) for v in versions}
    assert len(folders) == 4 and all("sm90" in f.name for f in folders)


def test_two_builds_may_store_one_kernel_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary, replace_file, nested = Binary("f", 4, 0, 0, b"cubin"), Path.replace, []

    def interrupted(self: Path, target: Path) -> Path:
        if not nested:
            nested.append(1)
            compile_module.store(binary, tmp_path, "key")  # another build, between our write and our rename
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    compile_module.store(binary, tmp_path, "key")
    assert stored(tmp_path, "key") == binary
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key.cubin", "key.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": {"us": 1}}', '{"a": 3}', "\udcff"])
def test_a_damaged_timing_cache_is_empty_and_replaced(tmp_path: Path, text: str) -> None:
    file = tmp_path / "timings.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    cache = TimingCache(file)
    assert cache.get("a") is None
    cache.put("a", Timing(median_us=2.0))
    cache.put("b", Timing(refused="no"))
    cache.save()
    again = TimingCache(file)
    assert again.get("a") == Timing(median_us=2.0) and again.get("b") is None


def test_a_manifest_without_a_field_is_named(tiny_engine: Path) -> None:
    data = json.loads((tiny_engine / store.MANIFEST).read_text())
    rest = {k: v for k, v in data.items() if k not in ("roof", "checksum")}
    with pytest.raises(EngineCorruptError, match="'roof'; build the engine again"):
        manifest.from_json({**rest, "checksum": manifest.checksum(rest)})


def test_another_schema_is_refused(tiny_engine: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    data = json.loads((copy / store.MANIFEST).read_text())
    with store.writing(tmp_path / "old") as part:
        (part / store.MANIFEST).write_text(json.dumps(data | {"schema": 0}))
    with pytest.raises(EngineSchemaError, match=f"schema 0, this version reads {manifest.SCHEMA}; build it again"):
        store.load(tmp_path / "old")


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"dtype": "float8"}, OptionError, "dtype='float8'"),
        ({"dtype": ["bfloat16"]}, OptionError, "dtype="),
        ({"max_batch_size": "4"}, OptionError, "max_batch_size='4' is a str; give an integer"),
        ({"max_seq_len": 64.0}, OptionError, "max_seq_len=64.0 is a float"),
        ({"weights": "zeros"}, OptionError, "weights='zeros'"),
        ({"max_seq_len": 999}, OptionError, "max_seq_len=999 exceeds the 256 positions"),
        ({"max_num_tokens": 2}, OptionError, "max_num_tokens=2 is below max_batch_size=4"),
        ({"device": "tpu"}, OptionError, "device='tpu'"),
    ],
)
def test_bad_options_are_named_before_any_work(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        build(tiny_model, options(tmp_path / "cache", **changes))
    assert not (tmp_path / "cache").exists()


def test_an_unknown_config_key_stops_the_build(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"attention_sparkle": 3}))
    with pytest.raises(ConfigError, match="attention_sparkle"):
        build(copy, options(cache))


def test_host_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    """Of 280 MB of weights a few at a time are in memory: tensors are streamed. Mapped pages of files are not ours."""
    program = f"""
import json, re, threading, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=512, intermediate_size=1408,
    num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=4, vocab_size=4096, max_position_embeddings=64,
    rms_norm_eps=1e-5, rope_theta=1e4, hidden_act="silu", tie_word_embeddings=True)
home = Path({str(tmp_path)!r})
(home / "m").mkdir()
(home / "m" / "config.json").write_text(json.dumps(config))
from penstock.models import declared, read_spec, weights
options = BuildOptions(device="cpu", cache_dir=home / "c", max_batch_size=2, max_num_tokens=8)
binding = weights(read_spec(config), config, "f32")
save_file({{n: torch.randn(t.shape) * 0.02 for n, t in declared(binding).items()}}, home / "m" / "model.safetensors")
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
peak, before, done = [0], anonymous(), threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
out = build(home / "m", options)
done.set()
watcher.join()
print(json.dumps([peak[0] - before, (out / "rank0.safetensors").stat().st_size]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    grown, written = json.loads(done.stdout.splitlines()[-1])
    assert written > 200 << 20
    assert grown < written / 2
