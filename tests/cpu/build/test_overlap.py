"""A build for a GPU writes weights while it times tactics; what can still change waits, and a failure ends both."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from penstock.compiler import backend, weights
from penstock.compiler import build as build_module
from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.compiler.timing import Timing
from penstock.compiler.weights import WeightFile, Writing, compute, write_weights
from penstock.engine import store
from penstock.engine.device import H200
from penstock.engine.manifest import Weight
from penstock.errors import SelectionError
from penstock.ir.graph import Graph, tensor
from penstock.ir.op import emit
from penstock.kernels.tactic import PLAIN
from tests.cpu.cli.test_inspect_gpu import FakeWorkshop


def random_weights(count: int) -> dict[str, Weight]:
    made = {}
    for i in range(count):
        node = emit("random", shape=(8, 4 + i), format="f32", seed=i, std=1.0)
        made[f"w{i}"] = Weight(tensor("f32", 8, 4 + i), PLAIN, Graph(node.outputs, ("weight",)))
    return made


def written(folder: Path, all_of: Mapping[str, Weight]) -> dict[str, Any]:
    write_weights(all_of, None, folder / "whole", "cpu", lambda _: None)
    return dict(load_file(folder / "whole"))


def writing(path: Path, of: Mapping[str, Weight]) -> Writing:
    types = {name: w.type for name, w in of.items()}
    return Writing(path, types, None, "cpu", lambda _: None, nullcontext, None)


def test_weights_begun_early_and_late_make_the_same_file(tmp_path: Path) -> None:
    made = random_weights(5)
    with writing(tmp_path / "parts", made) as file:
        file.begin({name: made[name] for name in ("w3", "w1")})
        file.finish(made)
    assert (tmp_path / "parts").read_bytes() and written(tmp_path, made).keys() == made.keys()
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_an_error_of_the_background_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError("full")

    monkeypatch.setattr(weights.os, "pwrite", full)
    with pytest.raises(OSError, match="full"), writing(tmp_path / "file", random_weights(3)) as file:
        file.begin(random_weights(3))
        file.finish(random_weights(3))


def test_a_stopped_file_takes_no_more_weights(tmp_path: Path) -> None:
    made, told = random_weights(4), list[int]()
    with WeightFile(tmp_path / "file", {name: w.type for name, w in made.items()}) as file:

        def tell(size: int) -> None:
            told.append(size)
            file.stop()

        file.write(made, None, "cpu", tell)
    assert len(told) == 1


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A build for a GPU that is not here."""
    monkeypatch.setattr(build_module, "detect", lambda _: H200)
    monkeypatch.setattr(backend, "Workshop", FakeWorkshop)
    monkeypatch.setattr(weights, "compute", lambda weight, source, device: compute(weight, source, "cpu"))
    return monkeypatch


def options(folder: Path) -> BuildOptions:
    return BuildOptions(dtype="bfloat16", max_batch_size=2, max_num_tokens=8, cache_dir=folder / "cache")


def test_weights_are_written_before_the_first_time_is_taken(
    tiny_model: Path, tmp_path: Path, on_a_gpu: pytest.MonkeyPatch
) -> None:
    begun, plain = threading.Event(), FakeWorkshop.time

    def waits(self: FakeWorkshop, *job: Any) -> Timing:
        assert begun.wait(20), "nothing is written meanwhile"
        return plain(self, *job)

    def computed(weight: Weight, source: Any, device: str) -> Any:
        begun.set()
        return compute(weight, source, "cpu")

    on_a_gpu.setattr(FakeWorkshop, "time", waits)
    on_a_gpu.setattr(weights, "compute", computed)
    engine = store.load(build(tiny_model, options(tmp_path), tmp_path / "engine"))
    assert {"read", "select", "weights", "compile", "time", "total"} == engine.build_seconds.keys()
    found = load_file(tmp_path / "engine" / store.weights_file())
    assert found.keys() == engine.weights.keys() and all(torch.isfinite(w).all() for w in found.values())


def test_a_selection_that_fails_ends_the_writing_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, on_a_gpu: pytest.MonkeyPatch
) -> None:
    on_a_gpu.setattr(FakeWorkshop, "time", lambda *_: Timing(refused="nothing runs today"))
    with pytest.raises(SelectionError, match="nothing runs today"):
        build(tiny_model, options(tmp_path), tmp_path / "out" / "engine")
    assert list((tmp_path / "out").iterdir()) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("penstock-weights")]
