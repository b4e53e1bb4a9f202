"""What a compiled kernel uses, from the binary itself, and the compile test that every topic shares. Needs no GPU.

A topic's whole compile test is one line (see `subprocess_cases` for CASES):

    assert compile_problems(CASES) == []

`resources(binary)` and `count(binary, "wgmma.mma_async")` are for what is particular to a topic.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from penstock.engine.device import H200
from penstock.engine.program import Site, Sizes
from penstock.errors import BuildError
from penstock.kernels.compile import Binary, compile_kernel
from penstock.kernels.registry import tactics
from penstock.kernels.tactic import Kernel, KernelUse

MAX_SHARED = 227 << 10  # bytes a program may use on compute capability 9.0


@dataclass(frozen=True, slots=True)
class Resources:
    registers: int  # per thread
    stack: int  # bytes per thread; anything but 0 is a spill
    local: int  # likewise
    shared: int  # bytes of static and dynamic shared memory


@lru_cache(maxsize=512)
def compiled(kernel: Kernel, capability: int = 90) -> Binary:
    """`compile_kernel`, once for each kernel of a test session."""
    return compile_kernel(kernel, capability)


def resources(binary: Binary) -> Resources:
    """Registers, stack, local and shared memory, by the cuobjdump that comes with Triton."""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.cubin)
        done = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", done.stdout)}
    return Resources(found["REG"], found["STACK"], found["LOCAL"], found["SHARED"] + binary.shared)


def count(binary: Binary, text: str) -> int:
    """How often an instruction stands in the PTX."""
    return binary.ptx.count(text)


def kernels(cases: Sequence[tuple[Site, Sizes]], capability: int = 90) -> Iterator[tuple[str, Kernel]]:
    """The distinct kernels of the cases' best configurations on such a device: (what it is, kernel)."""
    seen: set[Kernel] = set()
    device = replace(H200, capability=capability)
    for site, sizes in cases:
        for tactic in tactics(site.op):
            if tactic.supports(site, sizes, device) is None:
                config = tactic.tunables(site, sizes, device)[0]
                for step in tactic.plan(site, sizes, device, config).steps:
                    if isinstance(step, KernelUse) and step.kernel not in seen:
                        seen.add(step.kernel)
                        yield f"{site.key} by {tactic.name}", step.kernel


def compile_problems(cases: Sequence[tuple[Site, Sizes]], older: Sequence[int] = (80, 89)) -> list[str]:
    """Compile the kernels of the cases for 9.0, and a sample of them for `older`; complain of errors and spills.

    All of them for three capabilities would take minutes. So: every distinct kernel of the best configurations for
    9.0; of each function one for each combination of formats for the first of `older`, and one at all for the others.
    """
    problems: list[str] = []
    for capability in (90, *older):
        for what, kernel in _sample(kernels(cases, capability), capability, older):
            problems.extend(f"{what}, sm_{capability}: {x}" for x in _problems(kernel, capability))
    return problems


def _sample(found: Iterable[tuple[str, Kernel]], capability: int, older: Sequence[int]) -> Iterator[tuple[str, Kernel]]:
    """The first kernel of each kind, where not all are wanted."""
    kinds: set[tuple[str, frozenset[str]]] = set()
    for what, kernel in found:
        formats = frozenset(t for _, t in kernel.signature if t.startswith("*"))
        kind = (kernel.source, formats if capability in older[:1] else frozenset())
        if capability not in older or kind not in kinds:
            kinds.add(kind)
            yield what, kernel


def _problems(kernel: Kernel, capability: int) -> Iterator[str]:
    try:
        binary = compiled(kernel, capability)
    except BuildError as error:
        yield str(error)[:2000]
        return
    if binary.global_scratch:
        yield f"wants {binary.global_scratch} bytes of scratch that no launch provides"
    used = resources(binary)
    if capability == 90 and (used.stack or used.local):
        yield f"spills: {used}"
    if capability == 90 and used.shared > MAX_SHARED:
        yield f"wants more shared memory than there is: {used}"
