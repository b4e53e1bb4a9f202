"""A tactic: one implementation of an op. It says when it *can*; timing says when it *should*.

Nothing here imports torch or triton: `penstock check` and planning at load ask tactics on a machine without either.
A tactic plans by pure arithmetic, so the same question always gets the same launches.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from penstock.engine.device import Device
from penstock.engine.program import Arg, Call, Plan, Site, Sizes

Config = Mapping[str, int]
NO_CONFIG: Config = {}
CUDA_SUFFIXES = (".cu", ".cuh")
PLAIN = "plain"  # the layout of a row-major tensor
REFERENCE, PARTS = "reference", "parts"  # the tactics that ops have by derivation


@dataclass(frozen=True, slots=True)
class TritonKernel:
    """What to compile: a function in a source module, its argument types, constants and options.

    `source` is "module:function". `signature` lists the run-time arguments in order, types as Triton spells them
    ("*bf16", "i32"). Run-time integers are never specialised by value; those in `aligned` are promised to be
    multiples of 16, as all pointers are.
    """

    source: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int = 4
    num_stages: int = 1
    aligned: tuple[str, ...] = ()

    def key(self, capability: int) -> str:
        """Names the binary: the function, and a hash of everything that shapes it, its source text included."""
        return _kernel_key(self, capability)


@dataclass(frozen=True, slots=True)
class CudaKernel:
    """What to compile with NVRTC: a function of a CUDA C++ file that stands beside a module and has its name.

    `source` is "module:function", and `module`.cu the file; it may include every .cuh of its folder. `signature` lists
    the arguments in order, as for Triton; "map" is a tensor map. `constants` are the file's macros. `shared`: bytes of
    dynamic shared memory. Clusters are declared in the source; a launch's grid is a multiple of them.
    """

    source: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | str], ...]
    num_warps: int
    shared: int = 0

    def key(self, capability: int) -> str:
        """Names the binary: the function, and a hash of everything that shapes it, its source text included."""
        return _kernel_key(self, capability)

    @property
    def files(self) -> tuple[Path, ...]:
        """The source, then the headers that it may include."""
        path = _source_path(self.source.split(":")[0]).with_suffix(".cu")
        return path, *sorted(path.parent.glob("*.cuh"))


Kernel = TritonKernel | CudaKernel


def kernel_from_json(data: Mapping[str, Any]) -> Kernel:
    """The kernel whose `asdict` went through JSON."""
    pairs = {name: tuple(tuple(pair) for pair in data[name]) for name in ("signature", "constants")}
    if "aligned" in data:
        return TritonKernel(**{**data, **pairs, "aligned": tuple(data["aligned"])})
    return CudaKernel(**{**data, **pairs})


@lru_cache(maxsize=4096)
def _kernel_key(kernel: Kernel, capability: int) -> str:
    module, function = kernel.source.split(":")
    text = repr((kernel, capability, source_hash(module)))
    return f"{function}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _source_path(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin)


@lru_cache(maxsize=256)
def source_hash(module: str) -> str:
    """A hash of a kernel's source files and of all of ours, which it may draw on; nothing is imported for it."""
    path = _source_path(module)
    beside = [path, *sorted(p for p in path.parent.iterdir() if p.suffix in CUDA_SUFFIXES)]
    return hashlib.sha256(b"".join(p.read_bytes() for p in beside) + _own_sources()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _own_sources() -> bytes:
    own = sorted(Path(__file__).parent.rglob("*"))
    return b"".join(p.read_bytes() for p in own if p.name.endswith("_triton.py") or p.suffix in CUDA_SUFFIXES)


@dataclass(frozen=True, slots=True)
class KernelUse:
    """A planned launch of a kernel that may not be compiled yet."""

    kernel: Kernel
    grid: tuple[int, int, int]
    args: tuple[Arg, ...]  # one for each entry of the kernel's signature
    dependent: bool = True  # where the device can: `frozen_plan` decides
    cooperative: bool = False  # all blocks must be resident at once
    singles: bool = True  # False: it has nothing to do where every row of a step is a single token


@dataclass(frozen=True, slots=True)
class Draft:
    """What a tactic plans: uses of kernels and calls, and the bytes of workspace they share.

    `zeroed`: bytes of a second memory, which is zero when the first of them starts and which they leave zero (counters
    that the last to arrive resets). Every plan of a step uses the same: touch it only after `gdc_wait`.

    A kernel may start before the launch ahead of it has ended, or even waited: Triton kernels let the next one start
    right after their own wait, CUDA kernels before it. So what a kernel reads before its wait is weights and what
    `prepare` wrote, no more. The latter is there, since the first launch behind `prepare` lets nothing start before it
    has waited (`compiler.phases` refuses another), and whatever reads early stands behind that one: it is there for
    numbers that the step makes.
    """

    steps: tuple[KernelUse | Call, ...]
    workspace: int = 0
    zeroed: int = 0


class Tactic(ABC):
    """One implementation of one op. Subclasses are stateless and found by `kernels.registry`."""

    op: str
    name: str
    version: int = 1

    @abstractmethod
    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        """None where it can run; otherwise the reason why not. Torch-free and instant."""

    def layouts(self, site: Site, config: Config) -> Mapping[int, str]:
        """The layout wanted of each weight input; inputs not named are plain."""
        return {}

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        """Configurations worth timing, most promising first."""
        return (NO_CONFIG,)

    @abstractmethod
    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        """The launches for one bucket. `sizes` holds T, S, L, M, U of the bucket, but never N, the pool's blocks."""


def inputs(*indices: int) -> tuple[Arg, ...]:
    return tuple(Arg("in", i) for i in indices)


def outputs(*indices: int) -> tuple[Arg, ...]:
    return tuple(Arg("out", i) for i in indices)


def whole_call(name: str, site: Site) -> Call:
    """A call that takes all the site's inputs and gives all its outputs."""
    return Call(
        name,
        site.op,
        site.attrs,
        tuple((Arg("in", i), t) for i, t in enumerate(site.inputs)),
        tuple((Arg("out", i), t) for i, t in enumerate(site.outputs)),
    )


def frozen_plan(tactic: str, draft: Draft, capability: int) -> Plan:
    """The draft as the engine stores it: kernels named by key, launched dependently where the device can."""
    from penstock.engine.program import KernelLaunch

    able = capability >= 90
    launches = tuple(
        KernelLaunch(s.kernel.key(capability), s.grid, s.args, s.dependent and able, s.cooperative, s.singles)
        if isinstance(s, KernelUse)
        else s
        for s in draft.steps
    )
    return Plan(tactic, launches, draft.workspace, draft.zeroed)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
