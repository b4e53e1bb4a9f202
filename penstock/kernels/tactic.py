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
PLAIN = "plain"  # the layout of a row-major tensor


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


@lru_cache(maxsize=4096)
def _kernel_key(kernel: TritonKernel, capability: int) -> str:
    module, function = kernel.source.split(":")
    text = repr((kernel, capability, source_hash(module)))
    return f"{function}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@lru_cache(maxsize=256)
def source_hash(module: str) -> str:
    """A hash of a kernel's source file and of all of ours, which it may import from; nothing is imported for it."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return hashlib.sha256(Path(spec.origin).read_bytes() + _own_sources()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _own_sources() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*_triton.py")))


@dataclass(frozen=True, slots=True)
class KernelUse:
    """A planned launch of a kernel that may not be compiled yet."""

    kernel: TritonKernel
    grid: tuple[int, int, int]
    args: tuple[Arg, ...]  # one for each entry of the kernel's signature
    dependent: bool = True  # where the device can: `frozen_plan` decides


@dataclass(frozen=True, slots=True)
class Draft:
    """What a tactic plans: uses of kernels and calls, and the bytes of workspace they share."""

    steps: tuple[KernelUse | Call, ...]
    workspace: int = 0


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
        KernelLaunch(s.kernel.key(capability), s.grid, s.args, s.dependent and able) if isinstance(s, KernelUse) else s
        for s in draft.steps
    )
    return Plan(tactic, launches, draft.workspace)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
