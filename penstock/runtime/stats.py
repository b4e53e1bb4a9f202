"""What a run has counted since its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.runtime.executor import Executor


@dataclass(slots=True)
class Stats:
    """Counters since the start.

    `host_seconds`: CPU time that the executor's thread spent on `host_steps` steps outside the device's waits: from a
    read's end (or the arrival of work) to the next launch's end, so all that could keep the device waiting. On a CPU a
    launch is the step itself, and counts.
    """

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    requests: int = 0
    host_seconds: float = 0.0
    host_steps: int = 0

    @property
    def host_us_per_step(self) -> float:
        """Microseconds; 0 before the first step."""
        return 1e6 * self.host_seconds / self.host_steps if self.host_steps else 0.0


def snapshot(executor: Executor) -> dict[str, Any]:
    """All of it by name: what `LLM.stats` gives, whose docstring says what the less plain ones mean."""
    stats, scheduler, backend, pool = executor.stats, executor.scheduler, executor.backend, executor.kv.pool
    counters = scheduler.counters
    return {
        "steps": stats.steps,
        "requests": stats.requests,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "host_us_per_step": stats.host_us_per_step,
        "host_seconds": stats.host_seconds,
        "host_steps": stats.host_steps,
        "requests_running": scheduler.num_running,
        "requests_waiting": scheduler.num_waiting,
        "preemptions": counters.preemptions,
        "prefix_cache_queries": counters.asked_tokens,
        "prefix_cache_hits": counters.reused_tokens,
        "prefix_cache_evictions": pool.num_evicted,
        "kv_cache_usage": executor.kv.usage,
        "kv_cache_waste": scheduler.waste(),
        "kv_blocks": pool.num_usable,
        **backend.counters(),
        "load_seconds": dict(backend.load_seconds),
        "memory": dict(backend.memory),
    }
