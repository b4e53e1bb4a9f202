"""Run a tactic's draft through Triton's interpreter, on CPU tensors; TRITON_INTERPRET=1 is set before triton loads."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from penstock.engine.program import Arg, Call
from penstock.kernels.tactic import Draft, KernelUse

_POINTEES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
}
SLACK = 1 << 14  # bytes behind the workspace, in which a write would show
_TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
}


def patch() -> None:
    """Make the interpreter round to bf16 and fp8 as hardware does, and multiply bf16 as numbers, not bits."""
    plain_convert, plain_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if source not in _TORCH or target not in _TORCH or mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return plain_convert(x, source, target, mode)
        bits = np.ascontiguousarray(x).view(f"uint{source.primitive_bitwidth}").copy()
        values = torch.from_numpy(bits).view(_TORCH[source])
        most = torch.finfo(_TORCH[target]).max
        rounded = (values.clamp(-most, most) if target.primitive_bitwidth == 8 else values).to(_TORCH[target])
        unsigned = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}[target.primitive_bitwidth]
        return rounded.view(unsigned).numpy().reshape(x.shape)

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return plain_dot(self, widen(a), widen(b), d, *rest)

    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot


Memory = Mapping[str, torch.Tensor]  # "workspace", "zeroed"


def memory_of(draft: Draft) -> Memory:
    """Full of NaN, since nothing may rely on zeros, but where zeros are promised."""
    workspace = torch.full((draft.workspace + SLACK,), 0xFF, dtype=torch.uint8)
    return {"workspace": workspace, "zeroed": torch.zeros(draft.zeroed + 8, dtype=torch.uint8)}


def check(draft: Draft, memory: Memory) -> None:
    """After all steps."""
    assert (memory["workspace"][draft.workspace :] == 0xFF).all(), "something was written behind the workspace"
    assert not memory["zeroed"].any(), "the zeroed memory must be left zero"


def run(draft: Draft, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    """Run every kernel of the draft, in order, on whole tensors. Calls are not interpreted."""
    memory = memory_of(draft)
    for step in draft.steps:
        assert not isinstance(step, Call), "only kernels are interpreted"
        launch(step, {"in": inputs, "out": outputs}, memory)
    check(draft, memory)


def launch(use: KernelUse, tensors: Mapping[str, Sequence[torch.Tensor]], memory: Memory) -> None:
    module, name = use.kernel.source.split(":")
    function = getattr(importlib.import_module(module), name)
    values: dict[str, Any] = dict(use.kernel.constants)
    for (parameter, kind), arg in zip(use.kernel.signature, use.args, strict=True):
        values[parameter] = _value(arg, kind, tensors, memory)
    # The interpreter has neither dependent launch nor assembly.
    values |= {name: False for name in ("PDL", "NATIVE") if name in values}
    function[use.grid](**values)


def _value(arg: Arg, kind: str, tensors: Mapping[str, Sequence[torch.Tensor]], memory: Memory) -> Any:
    if arg.kind == "int":
        return arg.value
    if arg.kind in memory:
        rest = memory[arg.kind][arg.value :]
        dtype = _POINTEES[kind.removeprefix("*")]
        return rest[: rest.numel() // 8 * 8].view(dtype)
    tensor = tensors[arg.kind][arg.value]
    assert tensor.is_contiguous() and _POINTEES[kind.removeprefix("*")] == tensor.dtype, (kind, tensor.dtype)
    return tensor
