"""`python -m penstock.bench.moe --out FILE`: routing and experts of published mixtures, by numbers of tokens.

Every tactic is timed as a build times it, its numbers checked first; then eight layers in a row, of the fastest ones:
scores of their own, so that each goes to other experts, over more weights than a cache holds. Shares are of the roof
that is measured in the same run, for the weights of those experts alone that tokens went to.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from penstock.bench import records
from penstock.bench.records import Maker, Record
from penstock.compiler.candidates import candidates
from penstock.compiler.timing import Timing, captured, summary
from penstock.compiler.workers import Workshop
from penstock.engine.program import Plan, Site
from penstock.errors import BuildError
from penstock.ir.graph import Type, tensor
from penstock.ir.lazy import torch
from penstock.ir.op import get
from penstock.ir.ops.examples import fill
from penstock.kernels.compile import stored
from penstock.kernels.device import detect
from penstock.kernels.driver import Kernel, load
from penstock.kernels.launch import bind
from penstock.kernels.roof import Roof, device_seconds
from penstock.kernels.tactic import Draft, KernelUse, frozen_plan

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 8192)
LAYERS, WARM_UP, REPEATS = 8, 2, 9
WEIGHT_BYTES = 8 << 30  # of the layers, as far as they are not the same
FORMAT = "bf16"


@dataclass(frozen=True, slots=True)
class Mixture:
    """Sizes of a published model's layers."""

    width: int
    hidden: int
    experts: int
    chosen: int

    @property
    def route(self) -> Site:
        attrs = {"chosen": self.chosen, "renormalize": 1.0}
        scores = tensor("f32", "T", self.experts)
        return Site("route", (scores,), get("route").types([scores], attrs), tuple(sorted(attrs.items())))

    @property
    def moe(self) -> Site:
        x, (experts, weights) = tensor(FORMAT, "T", self.width), self.route.outputs
        w_in = tensor(FORMAT, self.experts, 2 * self.hidden, self.width)
        w_out = tensor(FORMAT, self.experts, self.width, self.hidden)
        return Site("moe", (x, experts, weights, w_in, w_out), (x,), (("act", "silu"),), (3, 4))

    @property
    def expert_bytes(self) -> int:
        return sum(t.nbytes() for t in self.moe.inputs[3:]) // self.experts


MODELS = {"mixtral-8x7b": Mixture(4096, 14336, 8, 2), "qwen3-30b-a3b": Mixture(2048, 768, 128, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m penstock.bench.moe", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default=records.commit(), help="where the tree is no checkout")
    parser.add_argument("--model", choices=sorted(MODELS), action="append", help="default: all")
    parser.add_argument("--tokens", type=int, action="append", help="of a step; default: 1 to 8192")
    arguments = parser.parse_args()
    device = detect("cuda")
    stamp = records.stamper(device, arguments.commit)
    with tempfile.TemporaryDirectory() as folder, Workshop(Path(folder), device) as shop:
        bench = Bench(shop, tuple(arguments.tokens or TOKENS))
        for record in bench.run({name: MODELS[name] for name in arguments.model or MODELS}):
            print(records.line(record), flush=True)
            records.append(arguments.out, [stamp(record)])
    if bench.refused:
        sys.exit("refused: " + "; ".join(bench.refused))


class Bench:
    """The measurements of all models on one device. `refused`: tactics whose numbers were off, or that failed."""

    def __init__(self, shop: Workshop, tokens: Sequence[int]) -> None:
        self.shop, self.device, self.tokens = shop, shop.device, tokens
        self.refused: list[str] = []

    def run(self, models: Mapping[str, Mixture]) -> Iterator[Record]:
        sites = [site for m in models.values() for site in (m.route, m.moe)]
        drafts = [draft for site in sites for t in self.tokens for _, draft in self.drafts(site, t)]
        failed = self.shop.compile({u.kernel for d in drafts for u in d.steps if isinstance(u, KernelUse)})
        self.refused += failed.values()
        roof = Roof(**self.shop.roof(FORMAT))
        yield Maker("", FORMAT)("roof_read", roof.read_bytes_per_s / 1e12, "TB/s")
        yield Maker("", FORMAT)("roof_products", roof.flops_per_s / 1e12, "TFLOP/s")
        for name, mixture in models.items():
            for tokens in self.tokens:
                yield from self.at(Maker(name, FORMAT), mixture, tokens, roof)

    def at(self, figure: Maker, m: Mixture, tokens: int, roof: Roof) -> Iterator[Record]:
        """Every tactic at a number of tokens, then layers of the best."""
        best: list[Plan] = []
        for site in (m.route, m.moe):
            timed = self.timed(site, tokens)
            for timing, plan in timed:
                note = plan.tactic
                yield figure(f"{site.op}_us_{tokens}", timing.median_us, "us", spread=timing.spread_us, note=note)
            best.append(timed[0][1])
        timing, active = layers(m, tokens, best, _Loaded(self.shop.folder))
        rows = 2.0 * tokens * m.width * 2
        flops = 6.0 * tokens * m.chosen * m.width * m.hidden
        share = roof.seconds(active * m.expert_bytes + rows, flops) * 1e6 / timing.median_us
        rates = f"{active:.1f} experts, {flops / timing.median_us / 1e6:.0f} TFLOP/s"
        note = f"route and moe; {rates}; {', '.join(plan.tactic for plan in best)}"
        yield figure(f"layer_us_{tokens}", timing.median_us, "us", share, timing.spread_us, note)

    def drafts(self, site: Site, tokens: int) -> Iterator[tuple[str, Draft]]:
        for c in candidates(site, {"T": tokens}, self.device, {})[0]:
            yield c.name, c.draft(site, {"T": tokens}, self.device, _no_parts)

    def timed(self, site: Site, tokens: int) -> list[tuple[Timing, Plan]]:
        """Those whose numbers are right, the fastest first. Raises BuildError where there is none."""
        found: list[tuple[Timing, Plan]] = []
        for name, draft in self.drafts(site, tokens):
            plan = frozen_plan(name, draft, self.device.capability)
            timing = self.shop.time(site, {"T": tokens}, plan, min((t.median_us for t, _ in found), default=inf))
            if timing.ok:
                found.append((timing, plan))
            else:
                self.refused.append(f"{site.op}, {tokens} tokens, {name}: {timing.refused}")
        if not found:
            raise BuildError(f"no tactic of {site.op} runs {tokens} tokens: {'; '.join(self.refused)}")
        return sorted(found, key=lambda f: f[0].median_us)


def layers(m: Mixture, tokens: int, plans: Sequence[Plan], kernels: Mapping[str, Kernel]) -> tuple[Timing, float]:
    """The time of a layer, and how many experts its tokens went to."""
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    copies = max(1, min(LAYERS, WEIGHT_BYTES // (m.experts * m.expert_bytes)))
    weights = [[fill(t, {}, generator, "cuda") for t in m.moe.inputs[3:]] for _ in range(copies)]
    built = [_layer(m, tokens, plans, kernels, weights[i % copies], generator) for i in range(LAYERS)]
    graph = captured([run for run, _ in built])
    seconds = [_replayed(graph) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    return summary(seconds, LAYERS), sum(len(experts.unique()) for _, experts in built) / LAYERS


def _layer(
    m: Mixture,
    tokens: int,
    plans: Sequence[Plan],
    kernels: Mapping[str, Kernel],
    weights: Sequence[Any],
    generator: Any,
) -> tuple[Callable[[], None], Any]:
    """What one layer launches, and where the experts that it chooses stand."""
    sizes = {"T": tokens}
    scores, x = (fill(t, sizes, generator, "cuda") for t in (m.route.inputs[0], m.moe.inputs[0]))
    chosen = [torch.empty(t.concrete(sizes), dtype=_dtype(t), device="cuda") for t in m.route.outputs]
    ends = ([scores], chosen), ([x, *chosen, *weights], [torch.empty_like(x)])
    steps: list[Callable[[], None]] = []
    for plan, (ins, outs) in zip(plans, ends, strict=True):
        work, zeroed = (torch.zeros(n + 256, dtype=torch.uint8, device="cuda") for n in (plan.workspace, plan.zeroed))
        steps += bind(plan, ins, outs, work, zeroed, kernels, sizes)
    return partial(_all, steps), chosen[0]


def _dtype(type: Type) -> Any:
    return getattr(torch, type.format.torch_dtype)


class _Loaded(dict[str, Kernel]):
    """Loads compiled kernels as they are asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, key: str) -> Kernel:
        binary = stored(self.folder, key)
        if binary is None:
            raise BuildError(f"{key} did not compile")
        self[key] = load(binary.cubin, binary.facts())
        return self[key]


def _all(steps: Sequence[Callable[[], None]]) -> None:
    for step in steps:
        step()


def _replayed(graph: Any) -> float:
    """Seconds of a replay, behind work that empties the L2 and keeps the device busy until the host has launched it."""
    torch.ones(64 << 20, device="cuda").sum()
    return device_seconds(graph.replay)


def _no_parts(site: Site) -> Any:
    raise AssertionError("only a fused op's `parts` needs parts")


if __name__ == "__main__":
    main()
