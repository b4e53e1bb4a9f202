"""Models and engines that several CPU tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.compiler.build import build
from penstock.compiler.options import BuildOptions
from tests.cpu import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_engine(tiny_model: Path, cache: Path) -> Path:
    """Four slots and 24 tokens a step, so that a handful of requests already waits, chunks and mixes."""
    return build(tiny_model, BuildOptions(device="cpu", cache_dir=cache, max_batch_size=4, max_num_tokens=24))
