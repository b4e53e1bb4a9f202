"""What the tactics of `moe` share: the sizes of a site as numbers, what they refuse, and how operands are passed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.ir.graph import Type
from penstock.kernels import gpu
from penstock.kernels.tactic import Config, KernelUse, TritonKernel

NAMES = ("x", "experts", "weights", "w_in", "w_out", "b_in", "b_out")  # of the op's inputs


@dataclass(frozen=True, slots=True)
class Mixture:
    """`chosen` of `experts` for each token, with rows of `width` and `hidden` features between."""

    tokens: int
    chosen: int
    experts: int
    width: int
    hidden: int
    inputs: Mapping[str, Type]
    act: str
    limit: float
    alpha: float

    @staticmethod
    def of(site: Site, sizes: Sizes) -> Mixture:
        named = dict(zip(NAMES, site.inputs, strict=False))
        tokens, chosen = named["experts"].concrete(sizes)
        experts, width, hidden = named["w_out"].concrete(sizes)
        limit, alpha = site.attr("limit", 0.0), site.attr("alpha", 1.702)
        return Mixture(tokens, chosen, experts, width, hidden, named, site.attr("act"), limit, alpha)

    @property
    def x(self) -> Type:
        return self.inputs["x"]

    @property
    def assignments(self) -> int:
        return self.tokens * self.chosen

    def tiles(self, size: int) -> int:
        """Tiles of `size` assignments to one expert each: as many as the most uneven choice can need."""
        return (self.assignments + min(self.experts, self.assignments) * (size - 1)) // size

    def args(self, names: Sequence[str]) -> tuple[tuple[str, str, Arg], ...]:
        """Those inputs that are there: their name, their type as Triton spells it, and where they are."""
        where = {name: Arg("in", i) for i, name in enumerate(NAMES)}
        return tuple((n, gpu.pointer(self.inputs[n]), where[n]) for n in names if n in self.inputs)


def refusal(site: Site, sizes: Sizes, device: Device, low: int, high: int | None = None) -> str | None:
    """Why no kernel of ours fits: the device, a format, or tokens outside low..high."""
    if why := gpu.refusal(site, device, tuple(i for i in range(len(site.inputs)) if i != 1)):
        return why
    tokens = Mixture.of(site, sizes).tokens
    if tokens < low or (high is not None and tokens > high):
        return f"{tokens} tokens; made for {low} {'up' if high is None else f'to {high}'}"
    return None


Given = tuple[tuple[str, str, Arg], ...]


def use(
    source: str, device: Device, given: Given, grid: tuple[int, int], config: Config, absent: Sequence[str] = (),
    **constants: Any,
) -> KernelUse:  # fmt: skip
    """A launch. The entries of `config` in capitals are constants too; pointers that are `absent` are None."""
    own = {name: value for name, value in config.items() if name.isupper()}
    fixed = {**dict.fromkeys(absent), **constants, **own}
    signature = tuple((name, kind) for name, kind, _ in given)
    options = int(config["warps"]), int(config.get("STAGES", 1))
    kernel = TritonKernel(source, signature, (*fixed.items(), gpu.pdl(device)), *options)
    return KernelUse(kernel, (*grid, 1), tuple(arg for *_, arg in given))


def number(name: str, value: int) -> Given:
    return ((name, "i32", Arg("int", value)),)


def missing(m: Mixture, *names: str) -> tuple[str, ...]:
    return tuple(n for n in names if n not in m.inputs)
