"""Every tactic and configuration against its op's reference, on the GPU, under graph capture."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import pytest

from penstock.compiler.candidates import Candidate, candidates
from penstock.compiler.timing import CudaTimer
from penstock.engine.program import Site, Sizes
from penstock.kernels.compile import compile_triton
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


@pytest.fixture(scope="module")
def binaries() -> dict[str, Kernel]:
    return {}


@pytest.mark.parametrize(("site", "sizes"), [(s, z) for _, s, z in ALL], ids=[name for name, _, _ in ALL])
def test_every_tactic_agrees_with_the_reference(site: Site, sizes: Sizes, binaries: dict[str, Kernel]) -> None:
    device = detect("cuda")
    every, refused = candidates(site, sizes, device, {})
    own = [c for c in every if c.tactic is not None and not isinstance(c.tactic, Reference)]
    assert own or refused
    timer = CudaTimer(device, binaries.__getitem__)
    wrong = {}
    for candidate in own:
        draft = candidate.draft(site, sizes, device, _no_parts)
        _compile(draft, device.capability, binaries)
        timing = timer(site, sizes, frozen_plan(candidate.name, draft, device.capability))
        if not timing.ok:
            wrong[candidate.name] = timing.refused
    assert not wrong


def _no_parts(site: Site) -> Draft:
    raise AssertionError("only a fused op's `parts` needs parts")


def _compile(draft: Draft, capability: int, binaries: dict[str, Kernel]) -> None:
    for step in draft.steps:
        if isinstance(step, KernelUse) and (key := step.kernel.key(capability)) not in binaries:
            binary = compile_triton(step.kernel, capability)
            binaries[key] = load(binary.cubin, binary.facts())


def test_the_cases_reach_every_tactic() -> None:
    """A tactic that no case reaches would go untested."""
    from penstock.kernels.registry import builtin

    reached = {(c.tactic.op, c.tactic.name) for _, s, z in ALL for c in _all(s, z) if c.tactic is not None}
    assert {(t.op, t.name) for t in builtin()} <= reached


def _all(site: Site, sizes: Sizes) -> tuple[Candidate, ...]:
    return candidates(site, sizes, detect("cuda"), {})[0]


