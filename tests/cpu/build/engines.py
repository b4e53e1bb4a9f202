"""Small engines for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from penstock.engine import store
from tests.cpu.models.twins import save_twin


def options(tmp_path: Path, **more: Any) -> BuildOptions:
    return BuildOptions(device="cpu", cache_dir=tmp_path / "cache", max_batch_size=2, max_num_tokens=16, **more)


def engine_of(model: Path, tmp_path: Path, name: str = "engine", **more: Any) -> Path:
    return build(model, options(tmp_path, **more), tmp_path / name)


def tiny(case: str, tmp_path: Path, name: str = "hf") -> Path:
    save_twin(case, tmp_path / name)
    return tmp_path / name


def weights_of(engine: Path) -> list[torch.Tensor]:
    """The stored weights in the order of the graph that reads them, whatever they are called."""
    tensors = load_file(engine / store.weights_file())
    return [tensors[name] for name in store.load(engine).weights]


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = weights_of(a), weights_of(b)
    return len(ours) == len(theirs) and all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
