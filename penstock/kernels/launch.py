"""Running plans: eagerly on torch tensors, or as launches bound to fixed memory that a CUDA graph captures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from penstock.engine.program import Arg, Call, KernelLaunch, Plan, Sizes
from penstock.ir.graph import Type
from penstock.ir.op import get
from penstock.kernels import driver
from penstock.kernels.calls import CALLS, Function
from penstock.kernels.driver import Kernel

Step = Callable[[], None]


class Eager:
    """An op's plan of calls alone, resolved once and run on tensors of any size: workspace offsets serve as names."""

    def __init__(self, op: str, plan: Plan, inputs: int, outputs: int) -> None:
        places = {Arg("in", i): i for i in range(inputs)}
        places |= {Arg("out", out): source for source, out in (get(op).writes or {}).items()}
        self._steps = tuple(_resolved(launch, places) for launch in plan.launches)
        self._results = [places[Arg("out", i)] for i in range(outputs)]
        self._scratch = [None] * (max(places.values(), default=0) + 1 - inputs)

    def __call__(self, inputs: Sequence[Any], sizes: Sizes | None = None) -> list[Any]:
        """The op's results."""
        env = [*inputs, *self._scratch]
        for function, call, sources, targets in self._steps:
            results = function(call, [env[i] for i in sources], None, sizes)
            for target, result in zip(targets, results, strict=True):
                env[target] = result
        return [env[i] for i in self._results]


def _resolved(call: Call | KernelLaunch, places: dict[Arg, int]) -> tuple[Function, Call, list[int], list[int]]:
    assert isinstance(call, Call), "kernels run only under capture"
    sources = [places[a] for a, _ in call.inputs]
    for arg, _ in call.outputs:
        places.setdefault(arg, max(places.values(), default=-1) + 1)
    return CALLS[call.name], call, sources, [places[a] for a, _ in call.outputs]


def bind(
    plan: Plan,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    workspace: Any,
    zeroed: Any,
    kernels: Mapping[str, Kernel],
    sizes: Sizes,
) -> tuple[Step, ...]:
    """The plan's launches on fixed tensors.

    `workspace`, `zeroed`: u8 tensors of at least plan.workspace and plan.zeroed bytes, the second full of zeros.
    """
    memory = _Memory(inputs, outputs, workspace, zeroed, sizes)
    return tuple(_bound(x, memory, kernels) for x in plan.launches)


class _Memory:
    """Where arguments live."""

    def __init__(
        self, inputs: Sequence[Any], outputs: Sequence[Any], workspace: Any, zeroed: Any, sizes: Sizes
    ) -> None:
        self.tensors = {"in": inputs, "out": outputs}
        self.bytes = {"workspace": workspace, "zeroed": zeroed}
        self.sizes = sizes

    def value(self, arg: Arg) -> tuple[Any, bool]:
        """(number or tensor map, is a pointer)."""
        if arg.kind == "int":
            return arg.value, False
        if arg.tile is not None:
            return driver.tensor_map(self._address(arg), arg.tile), True
        return self._address(arg), True

    def _address(self, arg: Arg) -> int:
        if arg.kind in self.bytes:
            return int(self.bytes[arg.kind].data_ptr()) + arg.value
        return int(self.tensors[arg.kind][arg.value].data_ptr())

    def tensor(self, arg: Arg, type: Type) -> Any:
        if arg.kind in self.bytes:
            return view(self.bytes[arg.kind], arg.value, type, self.sizes)
        return self.tensors[arg.kind][arg.value]


def view(memory: Any, offset: int, type: Type, sizes: Sizes) -> Any:
    """A typed tensor at a byte offset of a u8 tensor."""
    import torch

    raw = memory[offset : offset + type.nbytes(sizes)]
    return raw.view(getattr(torch, type.format.torch_dtype)).view(type.concrete(sizes))


def _bound(step: KernelLaunch | Call, memory: _Memory, kernels: Mapping[str, Kernel]) -> Step:
    """One launch. It holds on to `memory`, so that what it points to outlives it."""
    if isinstance(step, Call):
        ins = [memory.tensor(a, t) for a, t in step.inputs]
        outs = [memory.tensor(a, t) for a, t in step.outputs]
        return partial(_call, step, ins, outs, memory)
    return partial(_launch, step, kernels[step.kernel], [memory.value(a) for a in step.args], memory)


def _call(call: Call, inputs: Sequence[Any], outputs: Sequence[Any], memory: _Memory) -> None:
    CALLS[call.name](call, inputs, outputs, memory.sizes)


def _launch(step: KernelLaunch, kernel: Kernel, values: Sequence[tuple[Any, bool]], memory: _Memory) -> None:
    import torch

    driver.launch(kernel, step, values, torch.cuda.current_stream().cuda_stream)
