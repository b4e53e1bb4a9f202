"""Functions that a plan may name: a library's product, or an op's reference. They run eagerly and under capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from penstock import plugins
from penstock.engine.program import Call, Sizes
from penstock.ir.interpret import run_node

Results = tuple[Any, ...]
Function = Callable[[Call, Sequence[Any], Sequence[Any] | None, Sizes | None], Results]


def reference(call: Call, inputs: Sequence[Any], outputs: Sequence[Any] | None, sizes: Sizes | None) -> Results:
    """The op's own meaning. Where outputs are given, results are copied into them."""
    results = run_node(call.node, inputs, sizes)
    for out, result in zip(outputs or (), results, strict=bool(outputs)):
        if out.data_ptr() != result.data_ptr():
            out.copy_(result)
    return tuple(outputs) if outputs else results


def cublas(call: Call, inputs: Sequence[Any], outputs: Sequence[Any] | None, sizes: Sizes | None) -> Results:
    """x @ w.T (+ bias) by torch's matrix product, straight into the output."""
    import torch

    x, w, *bias = inputs
    if outputs is None:
        outputs = (torch.empty(x.shape[0], w.shape[0], dtype=_out_dtype(call), device=x.device),)
    (out,) = outputs
    if out.dtype == x.dtype:
        torch.addmm(bias[0], x, w.t(), out=out) if bias else torch.mm(x, w.t(), out=out)
    else:
        torch.mm(x, w.t(), out_dtype=out.dtype, out=out)
        if bias:
            out.add_(bias[0])
    return (out,)


def _out_dtype(call: Call) -> Any:
    import torch

    return getattr(torch, call.outputs[0][1].format.torch_dtype)


CALLS: dict[str, Function] = {"reference": reference, "cublas": cublas}


def register(name: str, function: Function) -> None:
    """Make a plugin's function known to plans by name. Raises PluginError for a name that is taken."""
    plugins.note("call", name, name in CALLS, lambda: CALLS.pop(name))
    CALLS[name] = function
