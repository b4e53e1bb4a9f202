"""Every tactic and configuration against its op's reference, on the GPU, under graph capture."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from penstock.compiler.candidates import Candidate, candidates
from penstock.compiler.timing import CudaTimer
from penstock.compiler.workers import Workshop
from penstock.engine.program import Site, Sizes
from penstock.kernels.compile import stored
from penstock.kernels.device import detect
from penstock.kernels.driver import Kernel, load
from penstock.kernels.reference import Reference
from penstock.kernels.tactic import Draft, KernelUse, frozen_plan
from tests.kernels import cases

pytestmark = pytest.mark.gpu


def _cases() -> Iterator[tuple[str, Site, Sizes]]:
    for info in pkgutil.iter_modules(cases.__path__):
        module = importlib.import_module(f"tests.kernels.cases.{info.name}")
        for site, sizes in module.CASES:
            yield f"{info.name}: {site.key} {dict(sizes)}", site, sizes


ALL = list(_cases())


def _own(site: Site, sizes: Sizes) -> list[tuple[Candidate, Draft]]:
    """Every candidate but the derived ones, drafted."""
    device = detect("cuda")
    every, _ = candidates(site, sizes, device, {})
    own = [c for c in every if c.tactic is not None and not isinstance(c.tactic, Reference)]
    return [(c, c.draft(site, sizes, device, _no_parts)) for c in own]


def _no_parts(site: Site) -> Draft:
    raise AssertionError("only a fused op's `parts` needs parts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kernels of all cases, compiled side by side."""
    path = tmp_path_factory.mktemp("kernels")
    steps = [step for _, s, z in ALL for _, draft in _own(s, z) for step in draft.steps]
    with Workshop(path, detect("cuda")) as shop:
        shop.compile({step.kernel for step in steps if isinstance(step, KernelUse)}, lambda: None)
    return path


@pytest.mark.parametrize(("site", "sizes"), [(s, z) for _, s, z in ALL], ids=[name for name, _, _ in ALL])
def test_every_tactic_agrees_with_the_reference(site: Site, sizes: Sizes, folder: Path) -> None:
    device = detect("cuda")
    timer = CudaTimer(device, lambda key: _loaded(folder, key))
    wrong = {}
    for candidate, draft in _own(site, sizes):
        timing = timer(site, sizes, frozen_plan(candidate.name, draft, device.capability))
        if not timing.ok:
            wrong[candidate.name] = timing.refused
    assert not wrong


@lru_cache(maxsize=1024)
def _loaded(folder: Path, key: str) -> Kernel:
    binary = stored(folder, key)
    assert binary is not None, f"{key} did not compile"
    return load(binary.cubin, binary.facts())


def test_the_cases_reach_every_tactic() -> None:
    """A tactic that no case reaches would go untested."""
    from penstock.kernels.registry import builtin

    reached = {(c.tactic.op, c.tactic.name) for _, s, z in ALL for c in _all(s, z) if c.tactic is not None}
    assert {(t.op, t.name) for t in builtin()} <= reached


def _all(site: Site, sizes: Sizes) -> tuple[Candidate, ...]:
    return candidates(site, sizes, detect("cuda"), {})[0]
