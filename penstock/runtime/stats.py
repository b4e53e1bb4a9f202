"""What a run has counted since its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.runtime.kv.manager import KvManager
from penstock.runtime.schedule.scheduler import Scheduler
from penstock.runtime.step import Backend


@dataclass(slots=True)
class Stats:
    """Counters since the start.

    `host_seconds`: CPU time that the executor's thread spent on `host_steps` steps outside the device's waits: from a
    read's end (or the arrival of work) to the next launch's end, so all that could keep the device waiting. On a CPU a
    launch is the step itself, and counts. `processor_steps`: that waited for logits processors; `controlled_steps`:
    with the controlled tail; `guided_steps`: whose tail waited for the masks of grammars. `device_seconds`: in which a
    step was under way, from its launch or the end of the one before to when the host had its tokens; `roof_seconds`:
    what those steps take at best, where the engine knows its device's rates; `active_seconds`: in which there was a
    request.
    """

    steps: int = 0
    prompt_tokens: int = 0
    requests: int = 0
    host_seconds: float = 0.0
    host_steps: int = 0
    controlled_steps: int = 0
    processor_steps: int = 0
    guided_steps: int = 0
    device_seconds: float = 0.0
    roof_seconds: float = 0.0
    active_seconds: float = 0.0

    @property
    def host_us_per_step(self) -> float:
        """Microseconds; 0 before the first step."""
        return 1e6 * self.host_seconds / self.host_steps if self.host_steps else 0.0

    @property
    def device_busy(self) -> float:
        """Share of the time with requests in which a step was under way, 0 to 1."""
        return min(1.0, self.device_seconds / self.active_seconds) if self.active_seconds else 0.0


def snapshot(
    stats: Stats, scheduler: Scheduler, kv: KvManager, backend: Backend, groups: Sequence[str], has_roof: bool
) -> dict[str, Any]:
    """All counters by name; `groups`: the names of the KV's groups."""
    counters = scheduler.counters
    return {
        "steps": stats.steps,
        "requests": stats.requests,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": counters.generated_tokens,
        "host_us_per_step": stats.host_us_per_step,
        "host_seconds": stats.host_seconds,
        "host_steps": stats.host_steps,
        "controlled_steps": stats.controlled_steps,
        "processor_steps": stats.processor_steps,
        "guided_steps": stats.guided_steps,
        "steps_off_fast_path": backend.slow_steps,
        "device_busy": stats.device_busy,
        "device_seconds": stats.device_seconds,
        "roof_seconds": stats.roof_seconds if has_roof else None,
        "requests_running": scheduler.num_running,
        "requests_waiting": scheduler.num_waiting,
        "preemptions": counters.preemptions,
        "prefix_cache_queries": counters.asked_tokens,
        "prefix_cache_hits": counters.reused_tokens,
        "prefix_caching": kv.reuse,
        "prefix_cache_evictions": kv.num_evicted,
        "host_cache_hits": kv.num_restored * kv.block_size,
        "host_cache_blocks": kv.host_blocks,
        "host_cache_usage": kv.host_usage,
        "kv_cache_usage": kv.usage,
        "kv_cache_waste": scheduler.waste(),
        "kv_blocks": kv.num_usable,
        "kv_groups": {
            name: {"blocks": tables.pool.num_usable, "usage": tables.usage}
            for name, tables in zip(groups, kv.groups, strict=True)
        },
        **backend.counters(),
        "load_seconds": dict(backend.load_seconds),
        "memory": dict(backend.memory),
    }
