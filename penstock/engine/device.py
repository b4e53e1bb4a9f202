"""What an engine is compiled for: the device and the software, as recorded facts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """The target. `capability` is 10 * major + minor of the CUDA compute capability; 0 on a CPU."""

    kind: str  # "cpu" | "cuda"
    name: str
    capability: int = 0
    multiprocessors: int = 0
    l2_bytes: int = 0
    memory_bytes: int = 0


CPU = Device("cpu", "cpu")
# A fixed record for compiling and planning without the card at hand.
H200 = Device("cuda", "NVIDIA H200", 90, 132, 60 << 20, 141 << 30)
