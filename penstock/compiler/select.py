"""Choosing layouts and tactics by timing.

Every site is timed at the tuned sizes of the symbols in its types: several configurations of each tactic at a few
anchor sizes, in between those that did well at the anchors on either side. Kernels compile while others are timed, so
candidates are drafted as early as possible: at the anchors all at once, in between as soon as a site's anchors are
known. What a model of bytes and operations, or the times of an op's parts, show to be hopeless is left out. One layout
is picked for each weight over all sizes, then the fastest candidate that reads it. A capture bucket uses the ranking of
its tuned size. Nothing is chosen that its reference disagrees with.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock import plugins
from penstock.compiler.candidates import Candidate, Pins, candidates
from penstock.compiler.estimate import judged
from penstock.compiler.timing import METHOD, Layouts, Timing
from penstock.compiler.timing_cache import TimingCache
from penstock.engine.device import Device
from penstock.engine.profile import Profile
from penstock.engine.program import KernelLaunch, Plan, Site, Sizes, plan_to_json
from penstock.errors import PluginError, SelectionError
from penstock.ir.graph import Graph
from penstock.kernels.reference import has_parts, parts_sites
from penstock.kernels.tactic import PLAIN, Draft, Kernel, KernelUse, frozen_plan

ANCHORS = (1, 16, 64, 512, 8192)  # tokens at which many configurations are timed; between them only the best ones
TRIED = 4  # configurations of each tactic that are timed at an anchor, by the tactic's own order
KEPT, IN_ALL = 2, 4  # and between anchors, or more if that leaves the site fewer in all,
NEAR = 1.1  # of those that came so near to the best at the anchor below or above
FAR_APART = 1.5  # times the best: parts that take longer one by one do not win together

# The number: microseconds of the best so far, or infinity. Last the layouts of weights that are not plain.
Timer = Callable[[Site, Sizes, Plan, float, Layouts], Timing]


class Compiler(Protocol):
    """Compiles kernels in the background, and says which could not be."""

    def submit(self, kernels: Iterable[Kernel], progress: Callable[[], None]) -> None:
        """Start compiling those that are neither compiled nor started."""

    def refusals(self, keys: Iterable[str]) -> dict[str, str]:
        """Wait for kernels that were started. By key, why those that did not compile did not."""


class NoCompiler:
    """For plans of calls alone."""

    def submit(self, kernels: Iterable[Kernel], progress: Callable[[], None]) -> None:
        assert not list(kernels), "a kernel was planned for a device without any"

    def refusals(self, keys: Iterable[str]) -> dict[str, str]:
        return {}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of timing.json."""

    site: str
    point: str
    tactic: str
    timing: Timing


@dataclass(frozen=True, slots=True)
class Trial:
    """Candidates of one site at one point, to be timed one after another. `parts` stand last and are planned then."""

    site: Site
    point: str
    sizes: Sizes
    plans: tuple[tuple[Candidate, Plan | None], ...]


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
        self.kernels: dict[str, Kernel] = {}
        self.used: set[str] = set()  # OP=NAME of each tactic in the plans asked for, those of parts too
        self._submitted = 0
        self._medians: dict[tuple[str, str, str], float] = {}  # (site, point, candidate) -> microseconds

    def run(self, graphs: Sequence[Graph]) -> Selection:
        """Time everything the graphs need. Raises SelectionError for a site that nothing can run."""
        sites = all_sites(graphs)
        plain = shared_weights(graphs)
        order = waves(sites)
        first = {site.key: self._trials(site, anchors=True) for wave in order for site in wave}
        for wave in order:
            between = []
            for site in wave:
                self._time_all(first[site.key])
                between.append(self._trials(site, anchors=False))
            for trials in between:
                self._time_all(trials)
            for site in wave:
                self._rank(site, force_plain=site.key in plain)
        return self.result

    def compile_rest(self) -> None:
        """Start compiling what plans of buckets between the tuned ones need besides."""
        self._submit()

    def always_plain(self, site: Site) -> bool:
        """Whether every candidate, at whatever size, reads the site's weights plain: known before any is timed."""
        plain = tuple((i, PLAIN) for i in site.weights)
        every = (c for sizes in self.points(site).values() for c in candidates(site, sizes, self.device, self.pins)[0])
        return all(candidate.layouts(site) == plain for candidate in every)

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
                self.used.add(candidate.key(site.op))
                return candidate, self._draft(candidate, site, sizes)
        raise SelectionError(f"no tactic runs {site.key} at {dict(sizes)}: {self.result.refused.get(site.key)}")

    def _draft(self, candidate: Candidate, site: Site, sizes: Sizes) -> Draft:
        return candidate.draft(site, sizes, self.device, lambda part: self._best(part, sizes)[1])

    def _trials(self, site: Site, anchors: bool) -> tuple[Trial, ...]:
        """What to time at the anchors, or between them; its kernels begin to compile."""
        points = [(p, sizes) for p, sizes in self.points(site).items() if self._is_anchor(p) == anchors]
        trials = tuple(Trial(site, p, sizes, self._planned(site, p, sizes, anchors)) for p, sizes in points)
        self._submit()
        return trials

    def _submit(self) -> None:
        """Start compiling the kernels planned since the last time."""
        new = list(self.kernels.values())[self._submitted :]
        self._submitted = len(self.kernels)
        self.compiler.submit(new, lambda: self.progress("compile"))

    def _planned(self, site: Site, point: str, sizes: Sizes, anchor: bool) -> tuple[tuple[Candidate, Plan | None], ...]:
        drafts = []
        for candidate in self._wanted(site, point, sizes, anchor):
            try:
                drafts.append((candidate, self._own_draft(candidate, site, sizes)))
            except PluginError as error:  # the tactic is out, and on record
                self.result.rows.append(Row(site.key, point, candidate.name, Timing(refused=str(error))))
        hopeless = self._hopeless(drafts, site, sizes) if self.device.kind == "cuda" else {}
        for name, reason in hopeless.items():
            self.result.rows.append(Row(site.key, point, name, Timing(refused=reason)))
        return tuple((c, self._plan(c, d) if d else None) for c, d in drafts if c.name not in hopeless)

    def _hopeless(self, drafts: Sequence[tuple[Candidate, Draft | None]], site: Site, sizes: Sizes) -> dict[str, str]:
        """By name, those that the model of bytes and operations leaves out, and why."""
        known = [(c.name, d or Draft(())) for c, d in drafts]
        return {name: reason for name, reason in judged(known, site, sizes, self.device) if reason}

    def _own_draft(self, candidate: Candidate, site: Site, sizes: Sizes) -> Draft | None:
        """None for parts, whose best tactics may not be known yet."""
        return None if candidate.tactic is None else self._draft(candidate, site, sizes)

    def _time_all(self, trials: Iterable[Trial]) -> None:
        for trial in trials:
            best = math.inf
            for candidate, plan in trial.plans:
                timing = self._timed(trial, candidate, plan, best)
                self.result.rows.append(Row(trial.site.key, trial.point, candidate.name, timing))
                best = min(best, timing.median_us) if timing.ok else best
                self.progress("time")

    def _timed(self, trial: Trial, candidate: Candidate, plan: Plan | None, best: float) -> Timing:
        site, sizes = trial.site, trial.sizes
        if plan is None:
            one_by_one = self._one_by_one(site, sizes)
            if self.device.kind == "cuda" and one_by_one > FAR_APART * best:
                return Timing(refused=f"its parts take {one_by_one:.1f} us one by one, the best takes {best:.1f} us")
            plan = self._plan(candidate, self._draft(candidate, site, sizes))
            self._submit()
        return self._time(site, sizes, candidate, plan, best)

    def _one_by_one(self, site: Site, sizes: Sizes) -> float:
        """Microseconds of the best tactics of a site's parts, as they were timed."""
        total = 0.0
        for part in parts_sites(site):
            name = self._best(part, sizes)[0].name
            at = (part.key, self.point(part, sizes), name)
            total += self._medians[at]
        return total

    def _is_anchor(self, point: str) -> bool:
        return not point.startswith("T") or int(point[1:]) in (*ANCHORS, self.profile.tuned_buckets[-1])

    def _wanted(self, site: Site, point: str, sizes: Sizes, anchor: bool) -> tuple[Candidate, ...]:
        """Of each tactic its most promising configurations at an anchor, elsewhere those that did best beside it."""
        every, refused = candidates(site, sizes, self.device, self.pins)
        self.result.refused.setdefault(site.key, {}).update(refused)
        if anchor:
            return _first_of_each(every, TRIED)
        beside = self._beside(site, point)
        known = {c.tactic_name for c in every if c.name in beside}
        ranked = sorted(every, key=lambda c: beside.get(c.name, math.inf))
        near = [c for c in ranked if beside.get(c.name, math.inf) <= NEAR or c.tactic_name not in known]
        tried = near if any(c.name in beside for c in near) else ranked  # what is new here may yet be refused
        kept = _first_of_each(tried, KEPT)
        more = [c for c in tried if c not in kept][: max(0, IN_ALL - len(kept))]
        return _first_of_each((*kept, *more), len(tried))

    def _beside(self, site: Site, point: str) -> dict[str, float]:
        """Each candidate's time relative to the best at the anchors below and above a point, the lesser of the two."""
        anchors = [p for p in self.points(site) if self._is_anchor(p)]
        size = _size(point)
        below = max((p for p in anchors if _size(p) < size), key=_size, default="")
        above = min((p for p in anchors if _size(p) > size), key=_size, default="")
        relative: dict[str, float] = {}
        for anchor in (below, above):
            rows = [r for r in self.result.rows if (r.site, r.point) == (site.key, anchor) and r.timing.ok]
            best = min((r.timing.median_us for r in rows), default=0.0)
            for row in rows:
                ratio = row.timing.median_us / max(best, 1e-9)
                relative[row.tactic] = min(ratio, relative.get(row.tactic, math.inf))
        return relative

    def _time(self, site: Site, sizes: Sizes, candidate: Candidate, plan: Plan, best: float) -> Timing:
        refusals = self.compiler.refusals(x.kernel for x in plan.launches if isinstance(x, KernelLaunch))
        if refusals:
            return Timing(refused=next(iter(refusals.values())))
        try:
            return self._known(site, sizes, candidate, plan, best)
        except PluginError as error:
            return Timing(refused=str(error))

    def _known(self, site: Site, sizes: Sizes, candidate: Candidate, plan: Plan, best: float) -> Timing:
        """What the cache has, else what is measured now."""
        digest = hashlib.sha256(json.dumps(plan_to_json(plan)).encode()).hexdigest()[:16]
        foreign = plugins.stamp(("op", site.op), ("tactic", candidate.key(site.op)))
        implementation = f"{candidate.name} v{candidate.version} {digest}{foreign}"
        key = f"{site.key} | {implementation} | {json.dumps(dict(sizes))} | method {METHOD}"
        timing = self.cache.get(key)
        if timing is None:
            packed = tuple((i, name) for i, name in candidate.layouts(site) if name != PLAIN)
            with plugins.border(("tactic", candidate.key(site.op)), ("op", site.op)):
                timing = self.timer(site, sizes, plan, best, packed)
            self.cache.put(key, timing)
        return timing

    def _rank(self, site: Site, force_plain: bool) -> None:
        """Pick the site's layout over all its points, then order each point's candidates that read it."""
        by_point = {point: self._measured(site, point, sizes) for point, sizes in self.points(site).items()}
        self._medians |= {(site.key, p, c.name): t.median_us for p, timed in by_point.items() for c, t in timed}
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


def _first_of_each(candidates: Iterable[Candidate], count: int) -> tuple[Candidate, ...]:
    """The first so many of each tactic, tactic by tactic; parts last."""
    by_tactic: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_tactic.setdefault(candidate.tactic_name, []).append(candidate)
    own = [c for group in by_tactic.values() for c in group[:count]]
    return tuple(sorted(own, key=lambda c: c.tactic is None))


def _size(point: str) -> int:
    return int(point[1:])


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
