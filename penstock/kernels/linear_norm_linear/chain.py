"""Two launches instead of three: the norm is split into what the first product can leave and the second can apply.

rms_norm(r) * g = (r g) / rms(r). The first product writes r, r g and shares of the rows' sums of squares; the second
multiplies r g and divides its sums. r g is rounded where the reference rounds (r / rms(r)) g: the same relative error.
float16 could overflow in r g, which the norm would have scaled down.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import product as pairs

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.linear import gemv
from penstock.kernels.linear.gemv import Gemv
from penstock.kernels.linear.hopper import Hopper, HopperProduct, HopperStream, hopper_use
from penstock.kernels.linear.product import Norm, Operands, Product
from penstock.kernels.reference import parts_sites
from penstock.kernels.tactic import Config, Draft, KernelUse, Tactic, cdiv

RUN = 8  # columns that hopper.cu stores at once
BEST = 2  # configurations of each product that are paired


def products(site: Site, sizes: Sizes) -> tuple[Product, Product]:
    first, _, second = parts_sites(site)
    return Product.of(first, sizes), Product.of(second, sizes)


def norms(site: Site, shares: int) -> tuple[Norm, Norm]:
    """What the two products do of the norm between them."""
    eps, offset = float(site.attr("eps")), float(site.attr("offset", 0.0))
    return Norm(offset=offset), Norm(parts=shares, eps=eps)


def operands(site: Site, scaled: int, shares: int) -> tuple[Operands, Operands]:
    """Both products' operands, given where in the workspace r g and the shares of squares stand."""
    x, w, residual, gain, w2, *bias = map(gpu.pointer, site.inputs)
    y, total = map(gpu.pointer, site.outputs)
    between = {"scaled": (Arg("workspace", scaled), total), "shares": (Arg("workspace", shares), "*fp32")}
    first = {
        "x": (Arg("in", 0), x),
        "w": (Arg("in", 1), w),
        "residual": (Arg("in", 2), residual),
        "gain": (Arg("in", 3), gain),
        "y": (Arg("out", 1), total),
        **between,
    }
    second = {
        "x": between["scaled"],
        "w": (Arg("in", 4), w2),
        "squares": between["shares"],
        "y": (Arg("out", 0), y),
    }
    return first, second | ({"bias": (Arg("in", 5), bias[0])} if bias else {})


def paired(first: Sequence[Config], second: Sequence[Config]) -> tuple[Config, ...]:
    """The best of each, in pairs; one's constants are marked with a 1, the other's with a 2."""
    return tuple(
        {f"{k}{i}": v for i, config in ((1, a), (2, b)) for k, v in config.items()}
        for a, b in pairs(first[:BEST], second[:BEST])
    )


def unpaired(config: Config, which: int) -> Config:
    """One product's share of a pair."""
    return {k[:-1]: v for k, v in config.items() if k.endswith(str(which))}


class Chain(Tactic):
    """Both products by kernels of one family."""

    op = "linear_norm_linear"
    family: Tactic

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        if any(t.format.name == "f16" for t in site.inputs):
            return "float16 may overflow where the norm is applied late"
        first, _, second = parts_sites(site)
        return self.family.supports(first, sizes, device) or self.family.supports(second, sizes, device)

    def tunables(self, site: Site, sizes: Sizes, device: Device) -> tuple[Config, ...]:
        first, _, second = parts_sites(site)
        return paired(self.family.tunables(first, sizes, device), self.family.tunables(second, sizes, device))

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        pair, configs = products(site, sizes), (unpaired(config, 1), unpaired(config, 2))
        shares = self.shares(pair[0], configs[0])
        scaled, squares = pair[0].tokens * pair[0].n * pair[0].out.bytes, pair[0].tokens * shares * 4
        between, total = gpu.layout(scaled, squares)
        given, norm = operands(site, *between), norms(site, shares)
        uses = (self.use(pair[i], device, configs[i], given[i], norm[i]) for i in (0, 1))
        return Draft(tuple(uses), total)

    @abstractmethod
    def shares(self, p: Product, config: Config) -> int:
        """How many sums of squares the first product leaves for each row."""

    @abstractmethod
    def use(self, p: Product, device: Device, config: Config, given: Operands, norm: Norm) -> KernelUse:
        """A product's launch."""


class GemvChain(Chain):
    """For very few tokens, on the plain cores."""

    name = "gemv"
    family = Gemv()

    def shares(self, p: Product, config: Config) -> int:
        return gemv.programs(p, config)

    def use(self, p: Product, device: Device, config: Config, given: Operands, norm: Norm) -> KernelUse:
        return gemv.gemv_use(p, device, config, given, norm)


class HopperChain(Chain):
    """For many tokens, on a Hopper device."""

    name = "hopper"
    family: HopperProduct = Hopper()

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        width = gpu.width(site.inputs[2])
        if width % RUN:
            return f"rows of {width} numbers; the kernel stores {RUN} at a time"
        w, beside = site.inputs[1].format, {"residual": site.inputs[2], "gain": site.inputs[3]}
        if other := [f"{name} is {t.format}" for name, t in beside.items() if t.format != w]:
            return f"{' and '.join(other)}; the kernel reads them as w, which is {w}"
        return super().supports(site, sizes, device)

    def shares(self, p: Product, config: Config) -> int:
        shape = self.family.shape(p, config)
        return cdiv(p.n, shape.rows) * shape.split

    def use(self, p: Product, device: Device, config: Config, given: Operands, norm: Norm) -> KernelUse:
        return hopper_use(p, device, self.family.shape(p, config), given, norm)


class HopperStreamChain(HopperChain):
    """For a few tokens, on a Hopper device."""

    name = "hopper_stream"
    family = HopperStream()
