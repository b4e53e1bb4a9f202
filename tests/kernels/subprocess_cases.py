"""Run a topic's cases through Triton's interpreter, in one process of their own (TRITON_INTERPRET must precede triton).

A topic is a module with `CASES`, a list of (Site, sizes). A test is one line, as few processes as may be: each start
costs seconds.

    assert failures("tests.kernels.cases.small") == []              # all cases; or only some ops:
    assert failures("tests.kernels.cases.small", ("sample",)) == []

Every case has a run for every tactic of its op that supports it (one must): the first case of a tactic in all its
configurations (less those that differ in warps or stages alone: the interpreter has neither), later ones in the best.
Where that takes minutes a test says `sample=True`, and makes the runs that compile something which no smaller one of
the op has (`_sample`); `make test-long` makes all of them (tests/long/test_every_kernel_case.py).
Outputs start as NaN or an extreme integer, so what a kernel leaves unwritten shows. Inputs that the op does not write
must come back unchanged. A topic may also define

    def examples(site, sizes, generator): ...      # several lists of inputs instead of the op's one `example`
    def agree(site, inputs, want, got): ...        # "" or what differs, instead of `differences`; inputs before the run

Both are also meant for the test on the GPU: this module imports without triton, and `differences` works on any device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

from penstock.engine.device import H200
from penstock.engine.program import Call, Site, Sizes
from penstock.formats.tolerance import tolerance
from penstock.ir.op import get
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, TritonKernel

ROOT = Path(__file__).parents[2]
SECONDS = 280
Run = tuple[int, Tactic | None, Config]  # which case


def failures(module: str, ops: Sequence[str] = (), sample: bool = False) -> list[str]:
    """What went wrong, one line or traceback for each run; empty when all agree."""
    return [f"{line['what']}: {line['error']}" for line in results(module, ops, sample) if line["error"]]


def results(module: str, ops: Sequence[str], sample: bool, seconds: float = SECONDS) -> list[dict[str, str]]:
    """{"what", "error"} of each run."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    which = "sample" if sample else "every"
    command = [sys.executable, "-m", "tests.kernels.subprocess_cases", which, module, *ops]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        error = f"the worker ended with {done.returncode} after {len(lines)} runs: {done.stderr[-3000:]}"
        return [*lines, {"what": module, "error": error}]
    return lines


def variants(topic: ModuleType, site: Site, sizes: Sizes, seed: int, device: str = "cpu") -> list[list[Any]]:
    """The lists of inputs to run a case with."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    if hasattr(topic, "examples"):
        return [list(x) for x in topic.examples(site, sizes, generator)]
    example = get(site.op).example
    assert example is not None, f"{site.op} has no example"
    return [list(example(site.inputs, dict(site.attrs), sizes, generator, device))]


def expected(site: Site, sizes: Sizes, inputs: Sequence[Any]) -> list[Any]:
    """The reference's results, rounded to the formats of the outputs. `inputs` that the op writes are written."""
    from penstock.ir.interpret import born

    op = get(site.op)
    out = op.reference(*inputs, **dict(site.attrs), **({"sizes": sizes} if op.sized else {}))
    return [born(t, y) for t, y in zip(site.outputs, out if isinstance(out, tuple) else (out,), strict=True)]


def poisoned(site: Site, sizes: Sizes, inputs: Sequence[Any]) -> list[Any]:
    """Fresh outputs full of NaN or the smallest integer; those that alias an input are that input."""
    import torch

    aliases = {out: inputs[i] for i, out in (get(site.op).writes or {}).items()}
    fresh = []
    for i, type in enumerate(site.outputs):
        dtype = getattr(torch, type.format.torch_dtype)
        poison = float("nan") if type.format.is_float else torch.iinfo(dtype).min
        shape = type.concrete(sizes)
        fresh.append(aliases[i] if i in aliases else torch.full(shape, poison, dtype=dtype, device=inputs[0].device))
    return fresh


def differences(site: Site, inputs: Sequence[Any], want: Sequence[Any], got: Sequence[Any]) -> str:
    """What is off, or "": each row of each output must be within its format's tolerance of its largest element."""
    problems = []
    for i, (type, w, g) in enumerate(zip(site.outputs, want, got, strict=True)):
        if not type.format.is_float:
            wrong = (w != g).nonzero()
            if len(wrong):
                at = tuple(wrong[0].tolist())
                problems.append(f"output {i}: {len(wrong)} differ, first at {at}: {w[at].item()} != {g[at].item()}")
            continue
        error = (g.double() - w.double()).abs().flatten(0, -2) if w.dim() > 1 else (g.double() - w.double()).abs()[None]
        scale = w.double().abs().reshape(error.shape).amax(-1).clamp_min(1e-30)
        worst = (error.amax(-1) / scale).max().item() if error.numel() else 0.0
        if not worst <= tolerance(type.format).relative:  # NaN fails
            problems.append(f"output {i} ({type}): relative error {worst:.3g} > {tolerance(type.format).relative}")
    return "; ".join(problems)


def _runs(cases: Sequence[tuple[Site, Sizes]], ops: Sequence[str]) -> Iterator[Run]:
    seen: set[Tactic] = set()
    for index, (site, sizes) in enumerate(cases):
        if ops and site.op not in ops:
            continue
        able = [t for t in tactics(site.op) if t.supports(site, sizes, H200) is None]
        if not able:
            yield index, None, {}
        for tactic in able:
            configs = _distinct(tactic.tunables(site, sizes, H200))
            if any(not _is_triton(s) for s in tactic.plan(site, sizes, H200, configs[0]).steps):
                continue  # a library's function or a CUDA kernel: nothing to interpret
            yield from ((index, tactic, c) for c in (configs[:1] if tactic in seen else configs))
            seen.add(tactic)


def _sample(cases: Sequence[tuple[Site, Sizes]], runs: Sequence[Run]) -> Iterator[Run]:
    """Of runs from few programs to many, those with a fact that none before has; and what no tactic supports."""
    drafts = [tactic.plan(*cases[index], H200, config) if tactic else None for index, tactic, config in runs]
    seen: set[Any] = set()
    for run, draft in sorted(zip(runs, drafts, strict=True), key=lambda x: _programs(x[1])):
        facts = {("no tactic", run[0])} if draft is None else _facts(cases[run[0]][0].op, run[1], draft)
        if not facts <= seen:
            yield run
        seen |= facts


def _programs(draft: Draft | None) -> int:
    return sum(prod(step.grid) for step in draft.steps if isinstance(step, KernelUse)) if draft else 0


def _facts(op: str, tactic: Tactic | None, draft: Draft) -> set[Any]:
    """What a kernel is compiled and called with: types, constants and whole numbers, of sizes only their kind."""
    assert tactic is not None
    uses = [step for step in draft.steps if isinstance(step, KernelUse)]
    told = [(use.kernel.source, *pair) for use in uses for pair in use.kernel.signature]
    told += [(use.kernel.source, name, _kind(value)) for use in uses for name, value in use.kernel.constants]
    told += [
        (use.kernel.source, name, _kind(arg.value))
        for use in uses
        for (name, _), arg in zip(use.kernel.signature, use.args, strict=True)
        if arg.kind == "int"
    ]
    return {(op, tactic.name, len(uses)), *((op, *fact) for fact in told)}


def _kind(value: Any) -> Any:
    """0, 1, a power of two, another whole number, another number; or what it is."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value in (0, 1):
        return value
    return "real" if isinstance(value, float) else "power" if value & (value - 1) == 0 else "whole"


def _is_triton(step: KernelUse | Call) -> bool:
    return isinstance(step, KernelUse) and isinstance(step.kernel, TritonKernel)


def _distinct(configs: Sequence[Config]) -> list[Config]:
    """The first of those that are the same to the interpreter, best first."""
    unlike: dict[Any, Config] = {}
    for c in configs:
        unlike.setdefault(tuple((k, v) for k, v in c.items() if k not in ("warps", "stages")), c)
    return list(unlike.values())


def _run(topic: ModuleType, site: Site, sizes: Sizes, tactic: Tactic, config: Config, seed: int) -> str:
    from tests.kernels import interpreted

    draft = tactic.plan(site, sizes, H200, config)
    writes = get(site.op).writes or {}
    problems = []
    for number, inputs in enumerate(variants(topic, site, sizes, seed)):
        want = expected(site, sizes, [x.clone() for x in inputs])
        mine = [x.clone() for x in inputs]
        got = poisoned(site, sizes, mine)
        interpreted.run(draft, mine, got)
        found = [getattr(topic, "agree", differences)(site, inputs, want, got)]
        same = [_same_bits(a, b) for a, b in zip(inputs, mine, strict=True)]
        found += [f"input {i} changed" for i, x in enumerate(same) if not x and i not in writes]
        problems += [f"variant {number}: {x}" for x in found if x]
    return "; ".join(problems)


def _same_bits(a: Any, b: Any) -> bool:
    """NaN too, which equals nothing."""
    import torch

    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def _work(which: str, module: str, ops: Sequence[str]) -> None:
    """The process under TRITON_INTERPRET=1: one JSON line for each run."""
    import torch

    from tests.kernels import interpreted

    torch.set_num_threads(1)
    interpreted.patch()
    topic = import_module(module)
    runs = list(_runs(topic.CASES, ops))
    for index, tactic, config in _sample(topic.CASES, runs) if which == "sample" else runs:
        site, sizes = topic.CASES[index]
        what = f"case {index}, {site.key}, {dict(sizes)}, {tactic.name if tactic else 'no tactic'} {dict(config)}"
        try:
            error = _run(topic, site, sizes, tactic, config, index) if tactic else "no tactic supports it"
        except Exception:  # the border of this process: reported to the test
            error = traceback.format_exc()[-2000:]
        print(json.dumps({"what": what, "error": error}), flush=True)


if __name__ == "__main__":
    _work(sys.argv[1], sys.argv[2], sys.argv[3:])
