"""What `prepare` wrote may be read before a kernel waits: the first launch behind it has waited for that."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import penstock.kernels
from penstock.compiler import pipeline
from penstock.compiler.candidates import candidates
from penstock.compiler.lower import lower
from penstock.compiler.phases import check_prepared, prepare_graph
from penstock.engine.device import H200
from penstock.engine.profile import Profile
from penstock.engine.program import Call, KernelLaunch, Phase, Plan, Program, Site
from penstock.errors import BuildError
from penstock.ir.graph import Graph, leaf, tensor
from penstock.ir.op import emit
from penstock.kernels.tactic import CudaKernel, Kernel, KernelUse, TritonKernel
from tests.golden.specs import FAMILIES, forward

PROFILE = Profile(4, 512, 512)
KERNELS: dict[str, Kernel] = {"triton": TritonKernel("m:f", (), ()), "cuda": CudaKernel("m:f", (), (), 4)}


def program(*launches: KernelLaunch | Call) -> Program:
    """prepare, two ops with a launch or more each, and whatever else."""
    x = leaf("input", "x", tensor("bf16", "T", 64))
    forward = Graph(emit("scale", emit("scale", x, factor=2.0)[0], factor=3.0).outputs, ("y",))
    graphs = {"prepare": prepare_graph(PROFILE), "forward": forward}
    first, second = (Site.of(n).key for n in forward.nodes if not n.is_leaf)
    plans = {first: Plan("first", launches[:1]), second: Plan("second", launches[1:])}
    plans |= {Site.of(n).key: Plan("own", (launch("triton"),)) for n in graphs["prepare"].nodes if not n.is_leaf}
    return Program(
        {name: Phase(g, {k: {"any": p} for k, p in plans.items()}) for name, g in graphs.items()},
        {"any": PROFILE.sizes(4, 4)},
    )


def launch(kernel: str, dependent: bool = True) -> KernelLaunch:
    return KernelLaunch(kernel, (1, 1, 1), (), dependent)


@pytest.mark.parametrize("first", [launch("triton"), launch("cuda", dependent=False), Call("c", "scale", (), (), ())])
def test_behind_one_that_has_waited_any_may_start_early(first: KernelLaunch | Call) -> None:
    check_prepared(program(first, launch("cuda"), launch("cuda")), KERNELS)


def test_a_first_launch_that_lets_others_start_at_once_is_refused() -> None:
    with pytest.raises(BuildError, match=r"begins with cuda for scale.*pin another"):
        check_prepared(program(launch("cuda"), launch("triton")), KERNELS)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_begins_with_kernels_that_wait_first(family: str) -> None:
    graph = lower(pipeline.run(forward(FAMILIES[family]))[0]).graph
    site = Site.of(next(n for n in graph.nodes if not n.is_leaf))
    seen = 0
    for tokens in (1, 16, 64, 300, 512):
        sizes = PROFILE.sizes(tokens, min(tokens, 4))
        for candidate in candidates(site, sizes, H200, {})[0]:
            step: Any = candidate.draft(site, sizes, H200, lambda part: pytest.fail("a fused op")).steps[0]
            assert isinstance(step, KernelUse) and isinstance(step.kernel, TritonKernel)
            seen += 1
    assert seen


def triggers() -> Iterator[tuple[str, str, str]]:
    for path in sorted(Path(penstock.kernels.__path__[0]).rglob("*_triton.py")):
        lines = path.read_text().splitlines()
        yield from ((path.name, a, b) for a, b in pairwise(lines) if "gdc_launch_dependents" in b)


def test_triton_kernels_let_others_start_right_after_their_wait() -> None:
    found = list(triggers())
    assert len(found) > 15
    assert not [name for name, before, _ in found if before.strip() != "tl.extra.cuda.gdc_wait()"]
