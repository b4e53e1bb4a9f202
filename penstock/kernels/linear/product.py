"""What the product tactics share: the sizes of a site as numbers, what they refuse, and how operands are passed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.formats import Format
from penstock.kernels import gpu
from penstock.kernels.tactic import Config, KernelUse, TritonKernel, inputs, next_power_of_2, outputs

MAX_CONFIGS = 8
SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}  # KiB that a program may use; 99 where not named (CUDA guide)


@dataclass(frozen=True, slots=True)
class Product:
    """x [tokens,k] @ w [n,k].T + bias; where `act` is named, the gated product of w's two halves."""

    tokens: int
    n: int
    k: int
    x: Format
    w: Format
    out: Format
    bias: Format | None
    act: str

    @staticmethod
    def of(site: Site, sizes: Sizes) -> Product:
        x, w = site.inputs[0], site.inputs[1]
        n, k = w.concrete(sizes)
        bias = site.inputs[2].format if len(site.inputs) > 2 else None
        out, act = site.outputs[0].format, str(site.attr("act", ""))
        return Product(gpu.rows(x, sizes), n, k, x.format, w.format, out, bias, act)


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


def product_use(
    p: Product, device: Device, source: str, grid: tuple[int, int, int], config: Config, parts: Arg | None = None
) -> KernelUse:
    """A launch of kernel `source` into the site's output, or without bias into float32 `parts`.

    The entries of `config` in capitals are the kernel's own constants; `warps` and `STAGES` are its options.
    """
    signature = [("x", f"*{p.x.triton_dtype}"), ("w", f"*{p.w.triton_dtype}")]
    args, constants = list(inputs(0, 1)), [("N", p.n), ("K", p.k), ("ACT", p.act), gpu.pdl(device)]
    if parts is None and p.bias is not None:
        signature.append(("bias", f"*{p.bias.triton_dtype}"))
        args.extend(inputs(2))
    else:
        constants.append(("bias", None))
    signature.extend([("y", "*fp32" if parts else f"*{p.out.triton_dtype}"), ("tokens", "i32")])
    args.extend([parts or outputs(0)[0], Arg("int", p.tokens)])
    constants.extend((name, value) for name, value in config.items() if name.isupper())
    kernel = TritonKernel(source, tuple(signature), tuple(constants), config["warps"], config.get("STAGES", 1))
    return KernelUse(kernel, grid, tuple(args))


def distinct(configs: Iterable[Config]) -> tuple[Config, ...]:
    """The first MAX_CONFIGS different ones, in order."""
    return tuple({tuple(c.items()): c for c in configs}.values())[:MAX_CONFIGS]


def shared_limit(device: Device) -> int:
    """Bytes of shared memory that one program may use."""
    return SHARED.get(device.capability, 99) << 10


def fitting_columns(columns: int, k: int) -> int:
    """A tile's share of K: no wider than K itself, rounded up to a power of two that tensor cores take."""
    return min(columns, max(32, next_power_of_2(k)))
