"""The launch whose blocks wait for each other: always the same numbers, and never for ever."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from penstock.compiler.timing import example_inputs
from penstock.engine.program import KernelLaunch, Plan
from penstock.kernels.compile import compile_kernel
from penstock.kernels.dense_block.stream import BlockStream
from penstock.kernels.device import detect
from penstock.kernels.driver import load
from penstock.kernels.launch import bind
from penstock.kernels.tactic import KernelUse, frozen_plan
from tests.kernels.cases.block import dense_block

pytestmark = pytest.mark.gpu
LAUNCHES, REPLAYS = 50, 40  # 2,000 launches a stream
SITE, SIZES = dense_block(512, 1024, 4224, 640, bias=True), {"T": 24}


def plan_and_kernels() -> tuple[Plan, dict[str, Any]]:
    torch.zeros(1, device="cuda")  # makes the context that kernels are loaded into
    device = detect("cuda")
    draft = BlockStream().plan(SITE, SIZES, device, {})
    (use,) = draft.steps
    assert isinstance(use, KernelUse)
    binary = compile_kernel(use.kernel, device.capability)
    key = use.kernel.key(device.capability)
    return frozen_plan("block", draft, device.capability), {key: load(binary.cubin, binary.facts())}


def switched(plan: Plan, dependent: bool) -> Plan:
    (launch,) = plan.launches
    assert isinstance(launch, KernelLaunch)
    return replace(plan, launches=(replace(launch, dependent=dependent),))


class Engine:
    """The plan bound to memory of its own, for two different inputs in turn, captured many times over.

    What a launch left in the workspace is wrong for the next one, which has to wait for its own.
    """

    def __init__(self, plan: Plan, kernels: dict[str, Any]) -> None:
        first = example_inputs(SITE, SIZES, "cuda")
        x, residual = (first[i].flip(0).neg().contiguous() for i in (0, 2))
        self.results = [torch.full(t.concrete(SIZES), float("nan"), device="cuda").bfloat16() for t in SITE.outputs * 2]
        self.zeroed = torch.zeros(plan.zeroed, dtype=torch.uint8, device="cuda")
        workspace = torch.full((plan.workspace,), 0xFF, dtype=torch.uint8, device="cuda")
        half, beside = len(SITE.outputs), (workspace, self.zeroed, kernels, SIZES)
        second = [x, first[1], residual, *first[3:]]
        self.steps = [  # they hold the memory
            *bind(plan, first, self.results[:half], *beside),
            *bind(plan, second, self.results[half:], *beside),
        ]
        self.stream, self.graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=self.stream):
            for i in range(LAUNCHES):
                self.steps[i % 2]()

    def replay(self) -> None:
        with torch.cuda.stream(self.stream):
            self.graph.replay()


def test_thousands_of_launches_on_three_streams_give_the_same_bits() -> None:
    plan, kernels = plan_and_kernels()
    engines = [Engine(switched(plan, dependent), kernels) for dependent in (True, True, False)]
    first = None
    for _ in range(REPLAYS):
        torch.cuda.synchronize()
        for engine in engines:
            engine.replay()
        torch.cuda.synchronize()
        first = first or [r.clone() for r in engines[0].results]
        for engine in engines:
            assert all(torch.equal(a, b) for a, b in zip(first, engine.results, strict=True))
            assert not engine.zeroed.any()
            for result in engine.results:
                result.fill_(float("nan"))
    assert first is not None and all(bool(r.isfinite().all()) for r in first)
    assert not torch.equal(first[0], first[len(SITE.outputs)])
