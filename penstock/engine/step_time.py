"""What a step should take, from what its operations took when the engine's tactics were timed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.engine.profile import Profile
from penstock.engine.program import CONTROLLED_TAIL, Phase, Program, Site, bucket_name
from penstock.engine.timings import Timings


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step's operations: by timed token size, and by rows of logits, what depends on their number alone.

    Attention was timed behind the context that its example assumes (`ir.ops.examples`), in steps that hold prompts. No
    launch and no pause between steps is in it.
    """

    tokens: Mapping[int, float]
    rows: Mapping[int, float]

    @staticmethod
    def of(program: Program, profile: Profile, timings: Timings) -> StepTime | None:
        """The sum over the nodes of a plain step's phases; None where nothing was timed by size, as on a CPU."""
        chosen = [phase for name, phase in program.phases.items() if name != CONTROLLED_TAIL]
        largest = profile.token_buckets[-1]
        tokens = {
            size: sum(_of(chosen, program, profile, timings, size, profile.logit_buckets(size)[-1], "T"))
            for size in profile.tuned_buckets
        }
        rows = {
            size: sum(_of(chosen, program, profile, timings, largest, size, "L"))
            for size in profile.logit_buckets(largest)
        }
        return StepTime(tokens, rows) if all(tokens.values()) else None


def _of(
    phases: Iterable[Phase], program: Program, profile: Profile, timings: Timings, tokens: int, logits: int, by: str
) -> Iterator[float]:
    """Seconds of each node that was timed by T, or by L."""
    name = bucket_name(tokens, logits)
    for phase in phases if name in program.buckets else ():
        for node in phase.graph.nodes:
            points = {} if node.is_leaf else timings.get(Site.of(node).key, {}).get("points", {})
            if points and (point := profile.point(program.buckets[name], points)).startswith(by):
                yield _median(points[point], phase.plan(node, name).tactic) / 1e6


def _median(timed: Mapping[str, Mapping[str, Any]], tactic: str) -> float:
    """Of the tactic in microseconds; of the fastest where that one was not timed here, 0 where none was."""
    medians = {name: float(facts["median_us"]) for name, facts in timed.items() if "median_us" in facts}
    return medians.get(tactic, min(medians.values(), default=0.0))
