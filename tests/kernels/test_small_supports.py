"""Where the small tactics refuse, with reasons; and that what they plan names every argument."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.engine.device import CPU, H200
from penstock.engine.program import KernelLaunch
from penstock.ir.graph import tensor
from penstock.ir.ops.state import SlotLayout
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import KernelUse, frozen_plan
from tests.kernels.cases.attention import CASES as ATTENTION
from tests.kernels.cases.linear import CASES as LINEAR
from tests.kernels.cases.small import CASES, SAMPLED, large, site, sizes


def refusals(*case) -> list[str | None]:
    found, shape, device = (*case, H200)[:3]
    return [t.supports(found, shape, device) for t in tactics(found.op)]


def test_a_cpu_is_refused() -> None:
    assert {r for case in CASES for r in refusals(*case, CPU)} == {"needs a CUDA device"}


def test_limits_are_named() -> None:
    x = tensor("bf16", "T", 16392)
    assert refusals(site("rms_norm", x, tensor("bf16", 16392), eps=1e-5), sizes(1)) == [
        "rows of 16392 numbers; at most 16384"
    ]
    assert refusals(site("split", tensor("bf16", "T", 8), sizes=(2, 2, 2, 2)), sizes(1)) == ["4 groups; at most 3"]
    huge = site("sample", tensor("f32", "L", 1 << 21), *(tensor(f, "L") for f in SAMPLED))
    assert refusals(huge, sizes(1)) == ["a vocabulary of 2097152 tokens; at most 524288"]
    layout = SlotLayout(4, 8, 2)
    prepare = site("prepare", tensor("i32", layout.size), tensor("i32", "U"), **layout.attrs())
    assert refusals(prepare, sizes(4, 1025, 1)) == ["1025 rows in a step; at most 1024"]
    layout = SlotLayout(4, 8, 2, tables=5)
    prepare = site("prepare", tensor("i32", layout.size), tensor("i32", "U"), **layout.attrs())
    assert refusals(prepare, sizes(4, 2, 1)) == ["5 block tables in a step; at most 4"]
    assert refusals(site("rms_norm", tensor("i32", "T", 8), tensor("i32", 8), eps=1e-5), sizes(1)) == [
        "input 0 is i32; supported are f32, f16, bf16"
    ]


@pytest.mark.parametrize("capability", [80, 90])
def test_plans_are_whole(capability: int) -> None:
    """Every kernel gets an argument for each parameter, and dependent launch only where the device has it."""
    device = replace(H200, capability=capability)
    for found, shape in (*CASES, *large()):
        for tactic in tactics(found.op):
            for config in tactic.tunables(found, shape, device):
                draft = tactic.plan(found, shape, device, config)
                uses = [s for s in draft.steps if isinstance(s, KernelUse)]
                assert len(uses) == len(draft.steps)
                assert all(len(u.args) == len(u.kernel.signature) and min(u.grid) > 0 for u in uses)
                assert all(dict(u.kernel.constants)["PDL"] == (capability >= 90) for u in uses)
                assert all(a.value < max(1, draft.workspace) for u in uses for a in u.args if a.kind == "workspace")


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_dependent_launch_is_asked_for_only_where_the_device_has_it(capability: int) -> None:
    device = replace(H200, capability=capability)
    for found, shape in (*CASES, *LINEAR, *ATTENTION):
        for tactic in tactics(found.op):
            if tactic.supports(found, shape, device) is None:
                draft = tactic.plan(found, shape, device, tactic.tunables(found, shape, device)[0])
                launches = frozen_plan(tactic.name, draft, capability).launches
                asked = {x.dependent for x in launches if isinstance(x, KernelLaunch)}
                assert asked <= {capability >= 90}, (tactic.op, tactic.name)
