"""One launch instead of six, for few tokens: weights stream on while one product ends and the next begins."""

from __future__ import annotations

from penstock.engine.device import Device
from penstock.engine.program import Arg, Site, Sizes
from penstock.kernels import gpu
from penstock.kernels.linear.block import Block, Cut, best_cut, block_draft
from penstock.kernels.linear.product import Operands, Product
from penstock.kernels.linear_norm_linear.chain import HopperStreamChain
from penstock.kernels.reference import parts_sites
from penstock.kernels.tactic import Config, Draft, Tactic

INPUTS = ("x", "w0", "residual", "gain_1", "w1", "w2", "gain_2", "w3", "bias")  # in the order of the op's
OUTPUTS = ("y", "total")


def operands(site: Site) -> Operands:
    """By name, where each input and result is, and its type."""
    ins = {name: (Arg("in", i), gpu.pointer(t)) for i, (name, t) in enumerate(zip(INPUTS, site.inputs, strict=False))}
    return ins | {
        n: (Arg("out", i), gpu.pointer(t)) for i, (n, t) in enumerate(zip(OUTPUTS, site.outputs, strict=True))
    }


def cut_of(site: Site, sizes: Sizes, device: Device) -> Cut | str:
    (e, q), (_, f), (n, _) = (site.inputs[i].concrete(sizes) for i in (1, 5, 7))
    return best_cut(Block(gpu.rows(site.inputs[0], sizes), q, e, f, n), device)


class BlockStream(Tactic):
    """Up to 128 tokens, all in one tile, on a Hopper device."""

    op = "dense_block"
    name = "hopper_stream"
    halves = HopperStreamChain()

    def supports(self, site: Site, sizes: Sizes, device: Device) -> str | None:
        for half in parts_sites(site):
            if why := self.halves.supports(half, sizes, device):
                return why
        cut = cut_of(site, sizes, device)
        return cut if isinstance(cut, str) else None

    def plan(self, site: Site, sizes: Sizes, device: Device, config: Config) -> Draft:
        cut, gated = cut_of(site, sizes, device), parts_sites(parts_sites(site)[0])[2]
        assert isinstance(cut, Cut), cut
        eps, offset = float(site.attr("eps")), float(site.attr("offset", 0.0))
        return block_draft(cut, device, Product.of(gated, sizes), operands(site), eps, offset)
