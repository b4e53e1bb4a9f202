"""Every tactic of an engine as its build timed it: bytes and operations a second, and the share of the roof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.compiler.select import all_sites
from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.engine.profile import Profile
from penstock.engine.program import Program, Site, Sizes
from penstock.errors import OptionError
from penstock.ir.cost import Cost, cost
from penstock.kernels.roof import Roof


@dataclass(frozen=True, slots=True)
class Timed:
    """A tactic at a tuned size. `refused`: why it was not timed; `share` is None where no rate is known."""

    op: str
    site: str
    at: str
    tactic: str
    chosen: bool
    cost: Cost
    median_us: float | None = None
    spread_us: float | None = None
    refused: str = ""
    share: float | None = None

    @property
    def bytes_per_s(self) -> float | None:
        return self.cost.bytes / self.median_us * 1e6 if self.median_us else None

    @property
    def flops_per_s(self) -> float | None:
        return self.cost.flops / self.median_us * 1e6 if self.median_us else None


def tactics(directory: Path, roof: Roof | None, op: str | None = None, at: str | None = None) -> list[Timed]:
    """What an engine's timing.json holds, in its order, the fastest of each size first.

    op: of this op alone; at: at this tuned size alone ("T64", "L8", "any"). Raises OptionError for one that is not
    there, EngineError where the directory is no engine.
    """
    engine = store.load(directory)
    timing = store.timing(directory)
    program = engine.programs["decode"]
    sites = {key: site for key, site in program_sites(program).items() if timing.get(key, {}).get("points")}
    _check("--op", op, {site.op for site in sites.values()})
    _check("--bucket", at, {point for key in sites for point in timing[key]["points"]})
    return [
        row
        for key, site in sites.items() if op in (None, site.op)
        for point, entries in timing[key]["points"].items() if at in (None, point)
        for row in _rows(engine, site, point, entries, timing, roof)
    ]  # fmt: skip


def roof_of(engine: Engine) -> Roof | None:
    """The rates that the build measured; None where it measured none."""
    return Roof(**engine.roof) if engine.roof else None


def program_sites(program: Program) -> dict[str, Site]:
    """Every site of a program by its key, and of the parts of its fused ops."""
    return all_sites(phase.graph for phase in program.phases.values())


def sizes_at(profile: Profile, point: str) -> Sizes:
    """The sizes that a tuned size's name stands for."""
    if point == "any":
        return profile.unpadded["any"]
    count = int(point[1:])
    return profile.sizes(count, min(count, profile.max_batch_size))


def _rows(
    engine: Engine, site: Site, point: str, entries: Mapping[str, Any], timing: Mapping[str, Any], roof: Roof | None
) -> Iterator[Timed]:
    least = cost(site.op, site.inputs, site.outputs, site.attrs, sizes_at(engine.profile, point))
    chosen = _chosen(engine, site.key, point, timing[site.key]["points"])
    for tactic, facts in sorted(entries.items(), key=lambda item: item[1].get("median_us", float("inf"))):
        median = facts.get("median_us")
        share = roof.seconds(*least) * 1e6 / median if roof and median else None
        yield Timed(
            site.op, site.key, point, tactic, tactic in chosen, least, median, facts.get("spread_us"),
            facts.get("refused", ""), share,
        )  # fmt: skip


def _chosen(engine: Engine, key: str, point: str, points: Mapping[str, Any]) -> set[str]:
    """The tactics that run a site in the buckets which use this tuned size; none for what only runs within others."""
    program = engine.programs["decode"]
    plans = next((phase.plans[key] for phase in program.phases.values() if key in phase.plans), {})
    return {
        plan.tactic for bucket, plan in plans.items() if engine.profile.point(program.buckets[bucket], points) == point
    }


def _check(flag: str, wanted: str | None, known: set[str]) -> None:
    if wanted is not None and wanted not in known:
        raise OptionError(
            f"{flag} {wanted!r} was not timed in this engine; it has {', '.join(sorted(known, key=_order))}"
        )


def _order(name: str) -> tuple[str, int]:
    """T8 before T64."""
    letters = name.rstrip("0123456789")
    return letters, int(name[len(letters) :] or 0)


def to_json(rows: Sequence[Timed]) -> list[dict[str, Any]]:
    """Plain data, rates in bytes and operations a second."""
    return [
        {
            "op": r.op, "site": r.site, "at": r.at, "tactic": r.tactic, "chosen": r.chosen, "median_us": r.median_us,
            "spread_us": r.spread_us, "refused": r.refused, "bytes": r.cost.bytes, "flops": r.cost.flops,
            "bytes_per_s": r.bytes_per_s, "flops_per_s": r.flops_per_s, "share_of_roof": r.share,
        }
        for r in rows
    ]  # fmt: skip
