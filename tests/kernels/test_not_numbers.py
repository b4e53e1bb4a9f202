"""What is not a number must come out as such, or a broken model would give text: the instructions that would lose it.

Triton's interpreter keeps it in any case, so what is compiled is looked at.
"""

from __future__ import annotations

import re

import pytest

from penstock.engine.device import H200
from penstock.engine.program import Site
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import KernelUse
from tests.kernels.cases.linear import linear_activate, linear_glu
from tests.kernels.cases.moe import CLAMPED, moe
from tests.kernels.resources import compiled

SITES = [
    linear_activate("bf16", 256, 512, "relu"),
    linear_activate("bf16", 256, 512, "relu2"),
    linear_glu("bf16", 256, 512, "relu"),
    moe("bf16", 4, 2, 64, 64, "relu"),
    moe("bf16", 4, 2, 64, 64, **CLAMPED),
]


@pytest.mark.parametrize("site", SITES, ids=lambda site: f"{site.op} {dict(site.attrs)['act']}")
@pytest.mark.parametrize("tokens", [4, 128])
def test_least_and_most_of_floats_keep_it(site: Site, tokens: int) -> None:
    sizes, found = {"T": tokens}, 0
    for tactic in tactics(site.op):
        if tactic.supports(site, sizes, H200) is None:
            draft = tactic.plan(site, sizes, H200, tactic.tunables(site, sizes, H200)[0])
            kernels = [step.kernel for step in draft.steps if isinstance(step, KernelUse)]
            ptx = "".join(compiled(kernel).ptx for kernel in kernels)
            assert not re.findall(r"\b(?:min|max)\.f32", ptx), tactic.name
            found += "max.NaN.f32" in ptx or "min.NaN.f32" in ptx
    assert found, "somebody clamps"
