"""What a run has counted since its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Stats:
    """Counters since the start.

    `host_seconds`: CPU time that the executor's thread spent on `host_steps` steps outside the device's waits: from a
    read's end (or the arrival of work) to the next launch's end, so all that could keep the device waiting. On a CPU a
    launch is the step itself, and counts. `processor_steps`: that waited for logits processors; `controlled_steps`:
<<<<<<< HEAD
    with the controlled tail. `device_seconds`: in which a step was under way, from its launch or the end of the one
    before to when the host had its tokens; `roof_seconds`: what those steps take at best, where the engine knows its
    device's rates; `active_seconds`: in which there was a request.
=======
    with the controlled tail; `guided_steps`: whose tail waited for the masks of grammars. `device_seconds`: in which a
    step was under way, from its launch or the end of the one before to when the host had its tokens; `active_seconds`:
    in which there was a request.
>>>>>>> hG
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
