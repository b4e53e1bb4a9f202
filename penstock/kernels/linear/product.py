"""What the product tactics share: the sizes of a site as numbers, what they refuse, and how operands are passed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.formats import Format
from penstock.kernels import gpu
from penstock.kernels.tactic import Config, KernelUse, TritonKernel, next_power_of_2

MAX_CONFIGS = 8
SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}  # KiB that a program may use; 99 where not named (CUDA guide)


@dataclass(frozen=True, slots=True)
class Product:
    """act(x [tokens,k] @ w [n,k].T + bias), where `act` is named; `gated`: act of w's first half times the second."""

    tokens: int
    n: int
    k: int
    x: Format
    w: Format
    out: Format
    bias: Format | None
    act: str
    gated: bool

    @staticmethod
    def of(site: Site, sizes: Sizes) -> Product:
        x, w = site.inputs[0], site.inputs[1]
        n, k = w.concrete(sizes)
        bias = site.inputs[2].format if len(site.inputs) > 2 else None
        out, act = site.outputs[0].format, str(site.attr("act", ""))
        gated = bool(act) and site.op != "linear_activate"
        return Product(gpu.rows(x, sizes), n, k, x.format, w.format, out, bias, act, gated)


def refusal(
    site: Site, sizes: Sizes, device: Device, low: int, high: int | None = None, same: bool = True
) -> str | None:
    """Why no product kernel of ours fits: the device, a format, or tokens outside low..high."""
    if why := gpu.refusal(site, device, tuple(range(len(site.inputs)))):
        return why
    p = Product.of(site, sizes)
    if same and p.x != p.w:
        return f"tensor cores want one format for both operands, not {p.x} and {p.w}"
    if p.tokens < low or (high is not None and p.tokens > high):
        return f"{p.tokens} tokens; made for {low} {'up' if high is None else f'to {high}'}"
    return None


@dataclass(frozen=True, slots=True)
class Norm:
    """The normalisation that a product's kernel takes part in, before or behind it.

    `parts`: in how many sums the squares of a row come.
    """

    parts: int = 0
    eps: float = 0.0
    offset: float = 0.0

    @property
    def constants(self) -> Mapping[str, Any]:
        return {"PARTS": self.parts, "EPS": self.eps, "OFFSET": self.offset}


NO_NORM = Norm()
Operands = Mapping[str, tuple[Arg, str]]  # a kernel's parameter: where it lives, and its type as Triton spells it


def operands(p: Product) -> Operands:
    """Those of a site that is the product and nothing else."""
    own = {"x": (Arg("in", 0), p.x), "w": (Arg("in", 1), p.w), "y": (Arg("out", 0), p.out)}
    if p.bias is not None:
        own["bias"] = (Arg("in", 2), p.bias)
    return {name: (arg, f"*{format.triton_dtype}") for name, (arg, format) in own.items()}


def product_use(
    p: Product, device: Device, source: str, grid: tuple[int, int, int], config: Config, given: Operands,
    names: Sequence[str],
) -> KernelUse:  # fmt: skip
    """A launch of kernel `source`, whose pointers are called `names`, in order; those not given are None.

    The entries of `config` in capitals are the kernel's own constants; `warps` and `STAGES` are its options.
    """
    used = [name for name in names if name in given]
    signature = (*((name, given[name][1]) for name in used), ("tokens", "i32"))
    constants: list[tuple[str, Any]] = [("N", p.n), ("K", p.k), ("ACT", p.act), ("GATED", p.gated), gpu.pdl(device)]
    constants += [(name, None) for name in names if name not in given]
    constants += [(name, value) for name, value in config.items() if name.isupper()]
    kernel = TritonKernel(source, signature, tuple(constants), int(config["warps"]), int(config.get("STAGES", 1)))
    return KernelUse(kernel, grid, (*(given[name][0] for name in used), Arg("int", p.tokens)))


def distinct(configs: Iterable[Config]) -> tuple[Config, ...]:
    """The first MAX_CONFIGS different ones, in order."""
    return tuple({tuple(c.items()): c for c in configs}.values())[:MAX_CONFIGS]


def shared_limit(device: Device) -> int:
    """Bytes of shared memory that one program may use."""
    return SHARED.get(device.capability, 99) << 10


def fitting_columns(columns: int, k: int) -> int:
    """A tile's share of K: no wider than K itself, rounded up to a power of two that tensor cores take."""
    return min(columns, max(32, next_power_of_2(k)))
