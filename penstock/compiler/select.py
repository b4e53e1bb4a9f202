"""Choosing layouts and tactics by timing.

Every site is timed at the tuned sizes of the symbols in its types: several configurations of each tactic at a few
anchor sizes, the best of them in between. One layout is picked for each weight over all sizes, then the fastest
candidate that reads it. A capture bucket uses the ranking of its tuned size. Nothing is chosen that its reference
disagrees with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock.compiler.candidates import Candidate, Pins, candidates
from penstock.compiler.timing import METHOD, Timing
from penstock.compiler.timing_cache import TimingCache
from penstock.engine.device import Device
from penstock.engine.profile import Profile
from penstock.engine.program import Plan, Site, Sizes, plan_to_json
from penstock.errors import SelectionError
from penstock.ir.graph import Graph
from penstock.kernels.reference import has_parts, parts_sites
from penstock.kernels.tactic import PLAIN, Draft, KernelUse, TritonKernel, frozen_plan

ANCHORS = (1, 16, 64, 512, 8192)  # tokens at which many configurations are timed; between them only the best ones
TRIED = 4  # configurations of each tactic that are timed at an anchor, by the tactic's own order
KEPT = 2  # and between anchors

Timer = Callable[[Site, Sizes, Plan], Timing]


class Compiler(Protocol):
    """Compiles kernels, and says which could not be."""

    def __call__(self, kernels: Iterable[TritonKernel], progress: Callable[[], None]) -> dict[str, str]: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One line of timing.json."""

    site: str
    point: str
    tactic: str
    timing: Timing


@dataclass
class Selection:
    """What was measured, and the rankings that follow from it."""

    rows: list[Row] = field(default_factory=list)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)  # site -> tactic -> why it cannot
    ranking: dict[tuple[str, str], tuple[Candidate, ...]] = field(
        default_factory=dict
    )  # (site, point) -> fastest first
    layouts: dict[str, dict[int, str]] = field(default_factory=dict)  # site -> weight input -> layout


class Selector:
    """Times the sites of graphs and answers which plan a site has in a bucket."""

    def __init__(
        self, profile: Profile, device: Device, timer: Timer, compiler: Compiler, cache: TimingCache,
        pins: Pins, progress: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.profile, self.device, self.pins = profile, device, pins
        self.timer, self.compiler, self.cache, self.progress = timer, compiler, cache, progress
        self.result = Selection()
        self.kernels: dict[str, TritonKernel] = {}
        self._uncompiled: dict[str, str] = {}

    def run(self, graphs: Sequence[Graph]) -> Selection:
        """Time everything the graphs need. Raises SelectionError for a site that nothing can run."""
        sites = all_sites(graphs)
        plain = shared_weights(graphs)
        for wave in waves(sites):
            self._round(wave, anchors=True)
            self._round(wave, anchors=False)
            for site in wave:
                self._rank(site, force_plain=site.key in plain)
        return self.result

    def points(self, site: Site) -> dict[str, Sizes]:
        """The sizes at which a site is timed, by name."""
        symbols = frozenset[str]().union(*(t.symbols for t in (*site.inputs, *site.outputs)))
        if self.device.kind == "cpu":
            return self.profile.unpadded
        if symbols & {"T", "S", "U"}:
            most = self.profile.max_batch_size
            return {f"T{t}": self.profile.sizes(t, min(t, most)) for t in self.profile.tuned_buckets}
        rows = self.profile.logit_buckets(self.profile.max_num_tokens) if "L" in symbols else (1,)
        return {f"L{n}": self.profile.sizes(n, n) for n in rows}

    def point(self, site: Site, sizes: Sizes) -> str:
        """The name of the tuned point whose ranking a bucket uses."""
        return self.profile.point(sizes, self.points(site))

    def plan(self, site: Site, sizes: Sizes) -> Plan:
        """The plan of a site in a bucket, its kernels noted for storing."""
        candidate, draft = self._best(site, sizes)
        return self._plan(candidate, draft)

    def _plan(self, candidate: Candidate, draft: Draft) -> Plan:
        for step in draft.steps:
            if isinstance(step, KernelUse):
                self.kernels[step.kernel.key(self.device.capability)] = step.kernel
        return frozen_plan(candidate.name, draft, self.device.capability)

    def _best(self, site: Site, sizes: Sizes) -> tuple[Candidate, Draft]:
        for candidate in self.result.ranking.get((site.key, self.point(site, sizes)), ()):
            if candidate.supports(site, sizes, self.device) is None:
                return candidate, self._draft(candidate, site, sizes)
        raise SelectionError(f"no tactic runs {site.key} at {dict(sizes)}: {self.result.refused.get(site.key)}")

    def _draft(self, candidate: Candidate, site: Site, sizes: Sizes) -> Draft:
        return candidate.draft(site, sizes, self.device, lambda part: self._best(part, sizes)[1])

    def _round(self, wave: Sequence[Site], anchors: bool) -> None:
        """Draft, compile and time one round of (site, point, candidate)."""
        jobs = [
            (site, point, sizes, candidate)
            for site in wave
            for point, sizes in self.points(site).items()
            if self._is_anchor(point) == anchors
            for candidate in self._wanted(site, point, sizes, anchors)
        ]
        plans = [self._plan(c, self._draft(c, site, sizes)) for site, _, sizes, c in jobs]
        self._uncompiled |= self.compiler(self.kernels.values(), lambda: self.progress("compile"))
        for (site, point, sizes, candidate), plan in zip(jobs, plans, strict=True):
            timing = self._time(site, sizes, candidate, plan)
            self.result.rows.append(Row(site.key, point, candidate.name, timing))
            self.progress("time")

    def _is_anchor(self, point: str) -> bool:
        return not point.startswith("T") or int(point[1:]) in (*ANCHORS, self.profile.tuned_buckets[-1])

    def _wanted(self, site: Site, point: str, sizes: Sizes, anchor: bool) -> tuple[Candidate, ...]:
        """Of each tactic its most promising configurations at an anchor, elsewhere those that did best at anchors."""
        every, refused = candidates(site, sizes, self.device, self.pins)
        self.result.refused.setdefault(site.key, {}).update(refused)
        best = {} if anchor else self._anchor_medians(site)
        by_tactic: dict[str, list[Candidate]] = {}
        for candidate in sorted(every, key=lambda c: best.get(c.name, float("inf"))):
            by_tactic.setdefault(candidate.tactic_name, []).append(candidate)
        return tuple(c for group in by_tactic.values() for c in group[: TRIED if anchor else KEPT])

    def _anchor_medians(self, site: Site) -> dict[str, float]:
        """Each candidate's time relative to the best of its point, the least over the anchors."""
        rows = [r for r in self.result.rows if r.site == site.key and r.timing.ok]
        fastest: dict[str, float] = {}
        for row in rows:
            fastest[row.point] = min(row.timing.median_us, fastest.get(row.point, float("inf")))
        relative: dict[str, float] = {}
        for row in rows:
            ratio = row.timing.median_us / max(fastest[row.point], 1e-9)
            relative[row.tactic] = min(ratio, relative.get(row.tactic, float("inf")))
        return relative

    def _time(self, site: Site, sizes: Sizes, candidate: Candidate, plan: Plan) -> Timing:
        for launch in plan.launches:
            if reason := self._uncompiled.get(getattr(launch, "kernel", ""), ""):
                return Timing(refused=reason)
        digest = hashlib.sha256(json.dumps(plan_to_json(plan)).encode()).hexdigest()[:16]
        implementation = f"{candidate.name} v{candidate.version} {digest}"
        key = f"{site.key} | {implementation} | {json.dumps(dict(sizes))} | method {METHOD}"
        timing = self.cache.get(key)
        if timing is None:
            timing = self.timer(site, sizes, plan)
            self.cache.put(key, timing)
        return timing

    def _rank(self, site: Site, force_plain: bool) -> None:
        """Pick the site's layout over all its points, then order each point's candidates that read it."""
        by_point = {point: self._measured(site, point, sizes) for point, sizes in self.points(site).items()}
        layout = _layout(site, by_point, force_plain)
        self.result.layouts[site.key] = dict(layout)
        for point, timed in by_point.items():
            fitting = [(t.median_us, i, c) for i, (c, t) in enumerate(timed) if c.layouts(site) == layout]
            if not fitting:
                raise SelectionError(self._nothing(site, point))
            self.result.ranking[site.key, point] = tuple(c for _, _, c in sorted(fitting, key=lambda x: x[:2]))

    def _measured(self, site: Site, point: str, sizes: Sizes) -> list[tuple[Candidate, Timing]]:
        rows = {r.tactic: r.timing for r in self.result.rows if (r.site, r.point) == (site.key, point)}
        every, _ = candidates(site, sizes, self.device, self.pins)
        return [(c, rows[c.name]) for c in every if c.name in rows and rows[c.name].ok]

    def _nothing(self, site: Site, point: str) -> str:
        tried = {r.tactic: r.timing.refused for r in self.result.rows if (r.site, r.point) == (site.key, point)}
        return f"no tactic runs {site.key} at {point}: {tried | self.result.refused.get(site.key, {})}"


def _layout(
    site: Site, by_point: Mapping[str, Sequence[tuple[Candidate, Timing]]], force_plain: bool
) -> tuple[tuple[int, str], ...]:
    """The layout whose best tactics lose least against the best of all, over the points."""
    plain = tuple((i, PLAIN) for i in site.weights)
    options = {c.layouts(site) for timed in by_point.values() for c, _ in timed}
    if force_plain or not options:
        return plain

    def loss(layout: tuple[tuple[int, str], ...]) -> float:
        total = 0.0
        for timed in by_point.values():
            fitting = [t.median_us for c, t in timed if c.layouts(site) == layout]
            total += min(fitting, default=float("inf")) / min((t.median_us for _, t in timed), default=1.0)
        return total

    return min(sorted(options), key=loss)


def all_sites(graphs: Iterable[Graph]) -> dict[str, Site]:
    """Every site of the graphs, and of the parts of their fused ops, parts first."""
    found: dict[str, Site] = {}

    def add(site: Site) -> None:
        if site.key not in found:
            for part in parts_sites(site) if has_parts(site.op) else ():
                add(part)
            found[site.key] = site

    for graph in graphs:
        for node in graph.nodes:
            if not node.is_leaf:
                add(Site.of(node))
    return found


def waves(sites: Mapping[str, Site]) -> tuple[tuple[Site, ...], ...]:
    """Groups in which no site needs another's ranking: plain ops, then fused ones by depth."""
    depth: dict[str, int] = {}
    for key, site in sites.items():
        below = [depth[p.key] for p in parts_sites(site)] if has_parts(site.op) else []
        depth[key] = 1 + max(below, default=-1)
    return tuple(
        tuple(s for k, s in sites.items() if depth[k] == level) for level in range(max(depth.values(), default=-1) + 1)
    )


def shared_weights(graphs: Iterable[Graph]) -> set[str]:
    """Sites that read a weight which another site reads too: such a weight stays plain."""
    readers: dict[str, set[str]] = {}
    for graph in graphs:
        for node in graph.nodes:
            for value in node.inputs:
                if value.node.op == "weight":
                    readers.setdefault(value.node.name, set()).add(Site.of(node).key)
    return {site for sites in readers.values() if len(sites) > 1 for site in sites}


def rows_to_json(selection: Selection) -> dict[str, Any]:
    """timing.json: by site and point, every candidate's time, or why it was refused."""
    sites: dict[str, Any] = {}
    for row in selection.rows:
        entry = {"median_us": round(row.timing.median_us, 3), "spread_us": round(row.timing.spread_us, 3)}
        cell = sites.setdefault(row.site, {"points": {}})["points"].setdefault(row.point, {})
        cell[row.tactic] = entry if row.timing.ok else {"refused": row.timing.refused}
    for key, refused in selection.refused.items():
        sites.setdefault(key, {"points": {}})["cannot"] = refused
    return sites
