"""How many prompt tokens may join a step for its decoding requests to hear their next token in time.

A step's time is predicted: where the engine's tactics were timed, from the sum over its operations by size; elsewhere
from steps already run alone. Either prediction is corrected by what steps are measured to take.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import inf
from typing import Protocol

from penstock.engine.manifest import Engine
from penstock.engine.step_time import StepTime
from penstock.engine.timings import Timings
from penstock.errors import OptionError

LEAST_CHUNK = 16  # tokens of a prompt that join a step in any case
RISE, FALL = 1 / 2, 1 / 64  # how much a step above its prediction counts for later ones, and one below
SURPRISE = 4.0  # times its prediction: what a step took beyond that is taken for a disturbance, and counts as that
LEAST_RATIO, MOST_RATIO = 1 / 4, 16.0  # measured to predicted
MEMORY = 1 / 8  # what one step counts in a running mean
MOST_SECONDS = 1e9
TICK = 1e-9  # seconds: the least that a step is taken to last
CHEAPEST = 1 / 16  # of a token's share of a step: the least that one more is taken to cost


class Pace:
    """The prompt budget of a target between tokens, for `Scheduler` as its `prompt_budget`.

    With prompts in it a step takes as many tokens as it may for its predicted time to stay within the target: a whole
    capture bucket on a GPU, since a step of 33 tokens runs as its bucket does. Where even a short chunk makes the step
    too long, prompts still go on, by LEAST_CHUNK tokens, and those that fill the bucket and so cost nothing. A step
    with its budget filled thus never shrinks where more requests decode, or where the target is longer.
    """

    def __init__(self, engine: Engine, target_seconds: float, timings: Timings | None = None) -> None:
        """`timings`: the engine's timing.json, or nothing. Raises OptionError for a target that is no time."""
        self.target = _checked(target_seconds)
        profile = engine.profile
        known = StepTime.of(engine.programs["decode"], profile, timings or {})
        padded = engine.device.kind != "cpu"
        self._sizes: Sequence[int] = profile.token_buckets if padded else range(1, profile.max_num_tokens + 1)
        self._clock: _Clock = _Learned() if known is None else _Timed(known)

    def budget(self, decoding: int) -> int:
        """Tokens of prompts that may join `decoding` rows of one token each; at least one."""
        rows = decoding + 1  # a prompt that ends gives logits too
        fitting = bisect_right(self._sizes, self.target, key=lambda size: self._clock.seconds(size, rows))
        size = self._sizes[fitting - 1] if fitting else 0
        return max(size, self._filled(decoding + LEAST_CHUNK)) - decoding

    def observe(self, tokens: int, rows: int, seconds: float) -> None:
        """A step of so many tokens and rows took this long, from the end of the step before, or of its own launch."""
        self._clock.observe(self._filled(tokens), rows, max(seconds, TICK), prompts=tokens > rows)

    def _filled(self, tokens: int) -> int:
        """What a step of so many tokens runs as; beyond the largest, itself."""
        at = bisect_left(self._sizes, tokens)
        return self._sizes[at] if at < len(self._sizes) else tokens


class _Clock(Protocol):
    """What steps take; never less for more tokens."""

    def seconds(self, tokens: int, rows: int) -> float:
        """Of a step in which prompts have a part."""
        ...

    def observe(self, tokens: int, rows: int, seconds: float, prompts: bool) -> None: ...


class _Timed:
    """The engine's timings times a running ratio.

    Only steps with prompts in them count: others leave kernels out. The ratio rises fast and falls slowly, and so stays
    near the slower ones of the steps; it covers contexts that are not those timed, and the pauses between steps.
    """

    def __init__(self, known: StepTime) -> None:
        self._tokens, self._rows = _Curve(known.tokens), _Curve(known.rows)
        self.ratio = 1.0

    def seconds(self, tokens: int, rows: int) -> float:
        return self.ratio * self._predicted(tokens, rows)

    def observe(self, tokens: int, rows: int, seconds: float, prompts: bool) -> None:
        if prompts:
            found = min(seconds / self._predicted(tokens, rows), SURPRISE * self.ratio)
            self.ratio += (RISE if found > self.ratio else FALL) * (found - self.ratio)
            self.ratio = min(max(self.ratio, LEAST_RATIO), MOST_RATIO)

    def _predicted(self, tokens: int, rows: int) -> float:
        return self._tokens.at(tokens) + self._rows.next(rows)


class _Curve:
    """A function of a size, known at some; never lower for a larger one."""

    def __init__(self, known: Mapping[int, float]) -> None:
        self._sizes = sorted(known)
        self._values = [*accumulate((known[size] for size in self._sizes), max)]

    def at(self, size: int) -> float:
        """On the line between its neighbours; beyond the last in proportion to it."""
        right = bisect_left(self._sizes, size)
        if right == len(self._sizes):
            return self._values[-1] * size / self._sizes[-1]
        if not right or self._sizes[right] == size:
            return self._values[right]
        left, part = right - 1, (size - self._sizes[right - 1]) / (self._sizes[right] - self._sizes[right - 1])
        return self._values[left] + part * (self._values[right] - self._values[left])

    def next(self, size: int) -> float:
        """At the first known size that is not smaller, or the last."""
        return self._values[min(bisect_left(self._sizes, size), len(self._sizes) - 1)]


class _Learned:
    """The line through two points: what steps with prompts take on average, and those without.

    Until one with a prompt has run, nothing is known of its tokens; no step is planned at over twice those that were.
    """

    def __init__(self) -> None:
        self._points: dict[bool, tuple[float, float]] = {}  # whether with prompts -> mean tokens and seconds

    def seconds(self, tokens: int, rows: int) -> float:
        if True not in self._points or tokens > 2 * max(self._points[True][0], LEAST_CHUNK):
            return inf
        size, took = self._points[True]
        return took + self._each(size, took) * (tokens - size)

    def _each(self, size: float, took: float) -> float:
        """Seconds of one token more: between next to nothing and its share of a whole step."""
        alone, least = self._points.get(False, (0.0, 0.0))
        slope = (took - least) / (size - alone) if size > alone else inf
        return min(max(slope, CHEAPEST * took / size), took / size)

    def observe(self, tokens: int, rows: int, seconds: float, prompts: bool) -> None:
        size, took = self._points.get(prompts, (float(tokens), seconds))
        seconds = min(seconds, SURPRISE * took)
        self._points[prompts] = (size + MEMORY * (tokens - size), took + MEMORY * (seconds - took))


def _checked(target: float) -> float:
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target <= MOST_SECONDS:
        raise OptionError(
            f"inter_token_latency_target={str(target)[:40]} is no time above 0; give seconds, such as 0.02, or None"
        )
    return float(target)
