"""The form of timing.json: by site and timed size, what every candidate took, or why it was refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Timings = Mapping[str, Mapping[str, Any]]  # site -> {"points": {point: {tactic: facts}}, "cannot": {tactic: why}}


def is_timing(entry: object) -> bool:
    """Whether an entry says of a site what the engine's readers ask for."""
    if not isinstance(entry, dict):
        return False
    points, cannot = entry.get("points", {}), entry.get("cannot", {})
    return _all(cannot, _is_text) and _all(points, lambda timed: _all(timed, _is_candidate))


def _is_candidate(facts: object) -> bool:
    """A time, with its spread, or a refusal."""
    if not isinstance(facts, dict):
        return False
    if "refused" in facts:
        return _is_text(facts["refused"])
    return all(is_number(facts.get(name)) for name in ("median_us", "spread_us"))


def _all(data: object, holds: Callable[[object], bool]) -> bool:
    return isinstance(data, dict) and all(map(holds, data.values()))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def is_number(value: object) -> bool:
    """Finite, from 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
