"""An engine directory becomes a running loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from penstock.engine import store
from penstock.engine.manifest import Engine
from penstock.engine.match import mismatch
from penstock.engine.profile import Profile
from penstock.errors import EngineMismatch, OptionError
from penstock.kernels.device import detect, software
from penstock.runtime.executor import Executor
from penstock.runtime.kv.pool import CPU_POOL_BYTES
from penstock.runtime.loop import Loop
from penstock.runtime.schedule.scheduler import Limits
from penstock.runtime.step import Backend, CpuBackend
from penstock.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Memory:
    """How much of the device may be used: a share of it, or bytes."""

    utilization: float = 0.9
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.utilization <= 1:
            raise OptionError(f"gpu_memory_utilization={self.utilization} is outside (0, 1]")
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise OptionError(f"max_gpu_bytes={self.max_bytes} must be positive")

    def budget(self) -> int:
        """Bytes of the current GPU that are free for us."""
        import torch

        free, total = torch.cuda.mem_get_info()
        if self.max_bytes is not None:
            return min(free, self.max_bytes)
        return int(free - (1 - self.utilization) * total)


@dataclass(frozen=True)
class RunLimits:
    """Limits of a run, at most those of the engine's profile; None: the profile's own."""

    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None

    def within(self, profile: Profile) -> Limits:
        """The scheduler's limits. Raises OptionError for one above the profile's."""
        chosen: dict[str, int] = {}
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len"):
            value, most = getattr(self, name), getattr(profile, name)
            if value is not None and value > most:
                raise OptionError(f"{name}={value} exceeds the {most} that the engine was built for; build it for more")
            chosen[name] = most if value is None else value
        return Limits(**chosen)


def open_backend(engine: Engine, directory: Path, memory: Memory) -> Backend:
    """Weights loaded and, on a GPU, the first buckets captured."""
    if engine.device.kind == "cpu":
        return CpuBackend(engine, directory, memory.max_bytes or CPU_POOL_BYTES)
    from penstock.runtime.cuda import CudaBackend

    return CudaBackend(engine, directory, memory.budget())


def open_loop(
    directory: Path, memory: Memory | None = None, tokenizer: Tokenizer | None = None, limits: RunLimits | None = None
) -> Loop:
    """Load an engine and start its executor. `tokenizer` None: token ids only.

    Raises EngineMismatch where the engine was compiled for another device or other software.
    """
    engine = store.load(directory)
    chosen = (limits or RunLimits()).within(engine.profile)
    _check_match(engine)

    def open_executor() -> Executor:
        return Executor(engine, open_backend(engine, directory, memory or Memory()), tokenizer, chosen)

    return Loop(open_executor)


def _check_match(engine: Engine) -> None:
    here = detect(engine.device.kind if engine.device.kind == "cpu" else "auto")
    versions = {name: v for name, v in software(here).items() if name != "triton"}  # compiles kernels, runs none
    if reason := mismatch(engine, here, versions):
        raise EngineMismatch(
            f"{reason}; run `penstock build` here, or open it with LLM(), which selects its tactics anew"
        )
