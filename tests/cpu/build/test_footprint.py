"""A model that could not run on the GPU at hand is refused before anything is timed, with what to lower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from penstock.compiler import build as module
from penstock.compiler.build import build, read_model
from penstock.compiler.footprint import footprint, require_room
from penstock.compiler.options import BuildOptions
from penstock.engine.device import CPU, H200, Device
from penstock.errors import ResourceError
from tests.cpu.build.engines import tiny


def limits(cache: Path, **given: int) -> BuildOptions:
    return BuildOptions(dtype="bfloat16", cache_dir=cache, **given)  # type: ignore[arg-type]


def test_a_build_that_could_not_run_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = tiny("llama", tmp_path), tmp_path / "cache"
    small = replace(H200, memory_bytes=600 << 20)  # less than its context
    monkeypatch.setattr(module, "detect", lambda _: small)
    with pytest.raises(ResourceError, match="weights alone do not fit"):
        build(model, limits(cache))
    assert not (cache / "engines").exists() and not (cache / "kernels").exists()


def test_room_is_what_is_needed_and_no_less(tmp_path: Path) -> None:
    draft = read_model(tiny("llama", tmp_path), limits(tmp_path), H200).draft
    need = int(footprint(draft, H200)["needed"])

    def having(size: int) -> Device:
        return replace(H200, memory_bytes=size)

    require_room(draft, having(need))
    with pytest.raises(ResourceError) as caught:
        require_room(draft, having(need - 1))
    profile = draft.profile
    for said in (f"max_seq_len={profile.max_seq_len}", f"max_num_tokens={profile.max_num_tokens}", "lower max_seq_len"):
        assert said in str(caught.value)
    lower = read_model(tmp_path / "hf", limits(tmp_path, max_seq_len=64), H200).draft
    require_room(lower, having(need - 1))


def test_a_cpu_takes_no_drivers_share(tmp_path: Path) -> None:
    draft = read_model(tiny("llama", tmp_path), limits(tmp_path), H200).draft
    assert footprint(draft, CPU)["driver"] == 0 < footprint(draft, H200)["driver"]
    require_room(draft, CPU)
