"""What the engine does right now and has done in all, from its beats: for the page, the metrics, and whoever asks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from penstock.serve.link import EngineLink

EVERY: Final = 0.25  # seconds between two looks at the newest beat
WINDOW: Final = 2.0  # seconds that rates and shares are taken over
TOTALS: Final = (
    "steps",
    "generated_tokens",
    "prompt_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prefix_cache_evictions",
    "host_cache_hits",
    "preemptions",
    "steps_off_fast_path",
    "processor_steps",
    "host_seconds",
    "device_seconds",
    "roof_seconds",
)


class Live:
    """Counters that go on over restarts of the engine, and what happened within the last WINDOW seconds.

    Of an engine that died, what it counted behind its last beat, a quarter of a second, is lost.
    """

    def __init__(self, link: EngineLink) -> None:
        self.link = link
        self._before = dict.fromkeys(TOTALS, 0.0)  # by engines that ended
        self._stats: Mapping[str, Any] = {}
        self._past: deque[tuple[float, dict[str, float]]] = deque()

    def look(self) -> None:
        """Take what the newest beat says."""
        beat = self.link.beat if self.link.state == "ready" else None
        stats = beat.stats if beat is not None else {}
        if stats is self._stats:
            return
        if self._stats and _number(stats, "steps") < _number(self._stats, "steps"):  # another engine, or none
            self._before = self.totals
            self._past.clear()
        self._stats = stats
        if beat is not None and stats:
            self._past.append((beat.time, self.totals))
            while beat.time - self._past[0][0] > WINDOW:
                self._past.popleft()

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(EVERY)

    @property
    def stats(self) -> Mapping[str, Any]:
        """What `LLM.stats` gives; empty while there is no engine."""
        return self._stats

    @property
    def totals(self) -> dict[str, float]:
        """Of all engines since the server's start."""
        return {name: before + _number(self._stats, name) for name, before in self._before.items()}

    @property
    def busy(self) -> float:
        """Share of the window in which a step was under way."""
        seconds = self._past[-1][0] - self._past[0][0] if self._past else 0.0
        return min(1.0, self._grown("device_seconds") / seconds) if seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated, in the window."""
        seconds = self._past[-1][0] - self._past[0][0] if self._past else 0.0
        return self._grown("generated_tokens") / seconds if seconds else 0.0

    @property
    def roof_share(self) -> float | None:
        """The least time of the window's steps by what they took; None where the roof is unknown, or no step ran."""
        took = self._grown("device_seconds")
        known = self._stats.get("roof_seconds") is not None
        return self._grown("roof_seconds") / took if known and took else None

    def _grown(self, name: str) -> float:
        return self._past[-1][1][name] - self._past[0][1][name] if self._past else 0.0

    def answer(self) -> dict[str, Any]:
        """What /live says. `kv_cache_usage`, `gpu_busy`, `roof_share`: 0 to 1; `roof_known`: of this device."""
        self.look()
        link, stats = self.link, self._stats
        stage, done, total = link.progress
        return {
            "state": link.state,
            "progress": {"stage": stage, "done": done, "total": total},
            "model": link.facts.get("model"),
            "device": device(link.facts),
            "running": _number(stats, "requests_running"),
            "waiting": _number(stats, "requests_waiting"),
            "kv_cache_usage": _number(stats, "kv_cache_usage"),
            "tokens_per_second": self.tokens_per_second,
            "gpu_busy": self.busy,
            "roof_share": self.roof_share,
            "roof_known": stats.get("roof_seconds") is not None,
            "restarts": link.restarts,
        }


def device(facts: Mapping[str, Any]) -> str:
    """Its name; empty while it is unknown."""
    return str(facts.get("device", {}).get("name", ""))


def _number(stats: Mapping[str, Any], name: str) -> float:
    """0 where it is unknown."""
    return stats.get(name) or 0
